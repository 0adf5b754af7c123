"""The title and the remedy of each error number; docs/reference/errors.md is generated from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue.

    Attributes:
        title: what the number means.
        remedy: what to do about it.
    """

    title: str
    remedy: str


CATALOGUE: Final[dict[int, Entry]] = {
    101: Entry(
        "a command's extra is not installed",
        "Install that extra from where fedge came: pip install 'WHEEL[EXTRA]', or '.[EXTRA]' in its repository.",
    ),
    102: Entry(
        "unknown command or option",
        "Do what the message asks; --help of the command says what it takes.",
    ),
    103: Entry("interrupted", "Run the command again; a run continues with --resume."),
    104: Entry(
        "unexpected failure inside fedge", "Run again with FEDGE_DEBUG=1 and report the trace."
    ),
    105: Entry(
        "no edge environment", "Install fedge[edge] in an environment and pass its bin folder."
    ),
    106: Entry("a child process failed", "Run the command that the message names by hand."),
    107: Entry("the output cannot be written", "Make room, or write elsewhere."),
    201: Entry(
        "a configuration value is not allowed",
        "Correct what the message names; a key's range is in `fedge config schema`, "
        "that of a home's files in docs/reference/site-files.md.",
    ),
    202: Entry(
        "unknown configuration key", "Use the nearest known key, or see `fedge config schema`."
    ),
    203: Entry("the configuration file cannot be read", "Give the path of a readable TOML file."),
    204: Entry("the TOML does not parse", "Correct the line and column that the message names."),
    205: Entry(
        "--set is not KEY=VALUE",
        "Write --set run.rounds=3; the value is TOML, bare words are text.",
    ),
    206: Entry(
        "the output directory is not empty",
        "Choose another --out (or --name), or continue the run that is there: --resume, `fedge server resume`.",
    ),
    207: Entry(
        "the run in the directory was started with another configuration",
        "Resume with the same configuration, or choose a new --out.",
    ),
    208: Entry("the run directory is in use", "Wait for the other process, or stop it."),
    209: Entry(
        "not a run directory",
        "Name a directory that `fedge simulate` or `fedge up` has written; weights that lie elsewhere need --task.",
    ),
    210: Entry(
        "the run directory cannot be written",
        "Choose an --out that this user may write, with room on its disk.",
    ),
    211: Entry(
        "the task is incompatible with this privacy mechanism",
        "Change what the message names, in the task or in [privacy]; see docs/explanation/privacy.md.",
    ),
    301: Entry("a data file is missing", "Point data.path at the folder that holds the files."),
    302: Entry("a data file does not follow its format", "Correct the row that the message names."),
    303: Entry(
        "the data cannot be partitioned as requested", "Use fewer sites, or another partition."
    ),
    304: Entry("unknown task", "Use one of the tasks that the message lists."),
    305: Entry(
        "the task's parts are incompatible",
        "Correct the task's declaration as the message says; see docs/how-to/add-a-task.md.",
    ),
    401: Entry(
        "not finite or out of range", "The site should lower its learning rate or check its data."
    ),
    402: Entry(
        "update norm above the policy's bound",
        "Check the site, or raise admission.max-update-norm.",
    ),
    403: Entry(
        "num-examples not allowed", "The site must report the number it registered with, or less."
    ),
    404: Entry(
        "tensors differ from the model's", "Run the same fedge release and task at every site."
    ),
    405: Entry(
        "metric dropped", "The site should report only the task's metrics, finite and in range."
    ),
    406: Entry("stale reply", "None needed; the site's next reply counts."),
    407: Entry("duplicate reply", "Look for a second process with the same site key."),
    408: Entry("late reply", "Raise round.deadline or lower the site's work."),
    409: Entry("no reply before the deadline", "Check that the site is connected."),
    410: Entry(
        "the site reported an error", "Look the number up; the text is in the site's own log."
    ),
    411: Entry("reply malformed", "Run the same fedge release at every site."),
    412: Entry("registration refused", "Check the site's name and its registered size."),
    413: Entry("the site's task failed", "Read the site's own log."),
    414: Entry("request refused by the site", "Send only what the site's worker serves."),
    415: Entry(
        "the site's data changed during a run", "Restore the site's data, or start a new run."
    ),
    416: Entry(
        "out of memory at the site",
        "Lower train.batch-size, or raise the policy's memory bound at the site.",
    ),
    417: Entry(
        "the site's device is no longer available",
        "Check the site's GPU and its driver; the worker restarts by itself.",
    ),
    418: Entry(
        "the site's policy does not allow this",
        "Use what the site's policy allows, for instance secure-aggregation.enabled=true; "
        "else have the site change its policy.toml, or leave it out.",
    ),
    419: Entry(
        "the Flower bundle is not one that the site approved",
        "Compare `fedge server bundle` with the site's policy.toml, key bundles.",
    ),
    420: Entry(
        "the site's worker does not answer",
        "See `fedge site status` and the worker's log at the site.",
    ),
    421: Entry(
        "a site's key is not valid in the signed roster",
        "Compare the site's roster with the consortium's newest one; `fedge roster verify` shows it.",
    ),
    422: Entry(
        "the server violates the secure aggregation protocol",
        "Stop the run at this site and show its log to the consortium; the update has not left.",
    ),
    423: Entry(
        "the round was answered already",
        "None needed; a site answers a round once, and the next round counts.",
    ),
    424: Entry(
        "too few sites for secure aggregation",
        "Wait for more sites, or have the sites lower min-sites in their policy.toml.",
    ),
    425: Entry(
        "a peer's encrypted share cannot be decrypted, or is not the one that it gave the hash of",
        "Look at the site that the message names; the round is tried again with new keys.",
    ),
    426: Entry(
        "the site has no keys of this secure sum",
        "None needed where the site's worker was restarted; the next attempt or round has new keys.",
    ),
    427: Entry(
        "the privacy budget would be exceeded",
        "Stop training on this site's data, or have the site's owner raise privacy.epsilon in policy.toml; "
        "`fedge privacy ledger` shows what is spent.",
    ),
    428: Entry(
        "the privacy ledger is not usable",
        "Put the newest backup of privacy.sqlite in its place and charge what was sent since: `fedge privacy restore`; "
        "if it is only locked, end the other process.",
    ),
    429: Entry(
        "the site's graph is not the server's",
        "Run the same releases of fedge, torch and onnx at the site and the server; calibration names tensors.",
    ),
    501: Entry("too few sites to make a round", "Connect more sites, or lower round.min-sites."),
    502: Entry(
        "a required site is missing", "Bring the site back, or take it off round.require-sites."
    ),
    503: Entry(
        "too many rounds in a row without a new model",
        "Read rounds.jsonl for the reasons and fix the sites; then resume, "
        "or submit a new run where no round is left.",
    ),
    504: Entry(
        "the journal or a checkpoint is damaged",
        "Restore the run directory from a backup, or start a new run.",
    ),
    505: Entry("the run is not finished", "Finish it with `fedge simulate ... --resume`."),
    506: Entry(
        "the strategy cannot work with this many replies",
        "Lower its number of malicious nodes, or connect more sites.",
    ),
    507: Entry(
        "the aggregate is not finite",
        "Lower the server's learning rate; the round was not committed.",
    ),
    508: Entry("the run was stopped by its operator", "Go on with `fedge server resume RUN`."),
    509: Entry(
        "the coordinator keeps crashing",
        "Read log/coordinator.log in the server's home; go on with `fedge server resume RUN`.",
    ),
    510: Entry(
        "the secure sum could not be unmasked",
        "See in rounds.jsonl which sites dropped out at which exchange; the next round has new keys.",
    ),
    511: Entry(
        "the secure sum is out of range",
        "A site masked a value out of range; the sum does not show which site: try without some.",
    ),
    601: Entry("the key file exists", "Choose another path; keys are never overwritten."),
    602: Entry(
        "the key cannot be read",
        "Give an Ed25519 key in PEM as `fedge keys new` writes it, readable by its owner alone (chmod 600).",
    ),
    603: Entry(
        "the exported model disagrees with the trained one",
        "Report the network; nothing was released.",
    ),
    604: Entry(
        "the exported model cannot be timed", "Install fedge[edge] beside fedge, and try again."
    ),
    605: Entry(
        "the output exists",
        "Do what the message says; otherwise choose another --out, or delete the file.",
    ),
    606: Entry(
        "the output cannot be written", "Choose a folder that exists and that you may write to."
    ),
    607: Entry("the network cannot be exported", "Report the network; nothing was released."),
    608: Entry(
        "a target is not known, or cannot be built here",
        "Use a target of `fedge compile --help`; a missing wheel is named in the message.",
    ),
    609: Entry(
        "there are no activation ranges for quantisation",
        "Run with --set calibration.enabled=true, and compile that run.",
    ),
    610: Entry(
        "the artefacts do not belong to the run",
        "Compile the run again: `fedge compile RUN_DIR --out DIR`, and release with that DIR.",
    ),
    611: Entry(
        "an artefact cannot be built",
        "Read the builder's error in the message; leave the target out to go on without it.",
    ),
    701: Entry("the bundle cannot be read", "Give the path of a .fedge file."),
    702: Entry(
        "the bundle is not a fedge archive, or was altered",
        "Fetch the bundle again from where it was released.",
    ),
    703: Entry("the signature does not verify", "Check --trust; do not use the bundle."),
    704: Entry(
        "a part's hash differs from the signed one", "Fetch the bundle again; do not use it."
    ),
    705: Entry(
        "a part is larger than allowed",
        "Do not use the bundle; ask its publisher for a smaller one.",
    ),
    706: Entry(
        "the manifest needs a feature that this runtime does not have",
        "Update fedge[edge] on the device.",
    ),
    707: Entry("the trusted key cannot be read", "Give the .pub file that `fedge keys new` wrote."),
    708: Entry(
        "the artefact does not load", "Check that onnxruntime is as new as the bundle requires."
    ),
    709: Entry(
        "the model's output is not finite",
        "Check the row that the message names; the model has no valid output for it.",
    ),
    710: Entry(
        "the artefact does not work on this device",
        "None needed, the next best artefact serves; `fedge-edge install` says what this device can run.",
    ),
    711: Entry(
        "what was installed on this device is damaged",
        "Install the bundle again: `fedge-edge install`.",
    ),
    712: Entry(
        "the bundle is of another task",
        "Give a bundle of the task that --task names, or leave that out.",
    ),
    713: Entry(
        "the bundle is older than it may be",
        "Give a newer one; `fedge-edge verify` prints a bundle's serial.",
    ),
    801: Entry("the input cannot be read", "Give a .npy or .csv file."),
    802: Entry(
        "the input's shape or columns differ from the schema",
        "See the schema in `fedge-edge verify --json`.",
    ),
    803: Entry(
        "the input's type differs from the schema", "Convert to the type that the message names."
    ),
    804: Entry("the input holds NaN or infinity", "Clean the rows that the message names."),
    805: Entry("the input is larger than allowed", "Split the file."),
    806: Entry("a category is not in the schema", "Use the categories that the message lists."),
    807: Entry(
        "the statistics file is incompatible with the bundle",
        "Pass the statistics.json that the site's worker wrote; none where verify asks for none.",
    ),
    808: Entry(
        "the server's request queue is full",
        "Try again later, send fewer at a time, or raise --max-queue.",
    ),
    809: Entry(
        "the request's deadline passed before its answer",
        "Allow more time, or lower --max-batch and the load.",
    ),
    810: Entry(
        "the request is not one of the Open Inference Protocol that this model answers",
        "See the names and shapes in the model's metadata (ModelMetadata).",
    ),
    901: Entry(
        "not a home of a server or site",
        "Correct the path that the message names, or create a home with `fedge server init` or `site init`.",
    ),
    902: Entry(
        "the home is in use",
        "Stop the other process: `stop` of a server or site, `fedge down` of a local federation.",
    ),
    903: Entry("the home exists already", "Choose another --home; keys are never overwritten."),
    904: Entry(
        "the address cannot be used",
        "Give host:port, with a free port and an address of this machine.",
    ),
    905: Entry("a process did not become ready", "Read the log that the message names."),
    906: Entry("a process keeps crashing", "Read the log that the message names."),
    907: Entry(
        "a certificate is not usable",
        "Renew it with `fedge server renew`; where keys or the authority are missing, restore the backup.",
    ),
    908: Entry(
        "a site's key is not usable", "Give the site.pub that `fedge site init` wrote (EC P-384)."
    ),
    909: Entry(
        "the TLS reverse proxy is missing", "Install nginx, or serve loopback addresses only."
    ),
    910: Entry(
        "the TLS reverse proxy refuses its configuration", "Read the line that the message quotes."
    ),
    911: Entry(
        "the daemon is not running",
        "Start it with `fedge server start` or `fedge site start`, if it should run.",
    ),
    912: Entry("the server cannot be reached", "Check the address, the link and the firewall."),
    913: Entry(
        "the server has not admitted this site",
        "Give site.pub to the server: `fedge server admit`; `fedge server status` lists the admitted sites.",
    ),
    914: Entry("no such run", "See `fedge server runs`."),
    915: Entry("a command of Flower failed", "Read its output, which the message quotes."),
    916: Entry(
        "the site is admitted already", "Choose another name, or `fedge server expel` it first."
    ),
    917: Entry(
        "the roster is not usable",
        "Install the roster.json that the consortium signed and its key as consortium.pub; "
        "restore a damaged roster-seen.json from a backup.",
    ),
    918: Entry(
        "the roster is older than one the site has seen", "Install the consortium's newest roster."
    ),
    919: Entry(
        "the site is not in the roster",
        "Where signing.key is missing or revoked, make one (`fedge keys new`); then give signing.key.pub "
        "to the consortium: `fedge roster add`, `fedge roster sign`.",
    ),
    920: Entry(
        "a certificate or key of the inference server cannot be used",
        "Give PEM files to --tls-cert, --tls-key and --client-ca; without TLS only loopback addresses are served.",
    ),
}
