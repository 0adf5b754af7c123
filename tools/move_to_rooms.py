"""Moves a tree from before the rooms to the layout of docs/explanation/architecture.md; goes with the next release.

Files, names that changed and whoever imports them are moved; comments, messages and the shape of the code are not. A
branch from before is merged so, with BEFORE the constant below::

    git checkout old-branch && git merge BEFORE
    git checkout main && python tools/move_to_rooms.py merge old-branch

This moves that branch and the commit BEFORE alike and applies what lies between them: what conflicts is what both
have changed. Commit it when `make check` is green. ``python tools/move_to_rooms.py tree FOLDER [COMPONENT ...]``
moves a tree in place.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

COMPONENTS = ("shared", "client", "server", "edge", "simulations")
#: The last commit before the move.
BEFORE = "8067a54"

#: Files by component: the old path, then the new one.
FILES = """
server
    admission                admission/validation
    reply                    admission/reply_fields
    verdicts                 admission/validation_result
    calibration_gate         admission/calibration_validation
    strategies               aggregation/strategies
    aggregation              aggregation/aggregate
    results                  aggregation/updates
    central                  aggregation/central_noise
    noised_sum               aggregation/integer_grid
    central_terms            aggregation/privacy_cost
    operate                  deployment/operations
    daemon                   deployment/daemon
    coordinators             deployment/run_scheduler
    control                  deployment/flower_control
    register                 deployment/site_registry
    server_file              deployment/server_config
    certificates             deployment/certificates
    issuance                 deployment/x509
    front                    deployment/reverse_proxy
    units/units              deployment/systemd
    members                  participants/members
    census                   participants/registration
    attendance               participants/availability
    talk                     participants/member_exchange
    requests                 participants/request_content
    release                  release/pipeline
    compile/compiler         release/compiler
    compile/build            release/artefacts
    compile/qualify          release/qualification
    compile/record           release/compile_record
    compile/stand_in         release/placeholder_manifest
    report/data              report/run_data
    report/masked            report/secure_data
    report/noised            report/noised_figures
    report/scales            report/axes
    report/pictures          report/heatmap
    report/values            report/json_values
    report/page              report/page/render
    report/summary           report/page/summary
    report/learning          report/page/learning
    report/participation     report/page/participation
    report/sites             report/page/sites
    report/cost              report/page/cost
    report/device            report/page/device
    report/secure            report/page/secure_aggregation
    report/privacy           report/page/privacy
    report/epsilon           report/page/privacy_epsilon
    report/central           report/page/privacy_central
    report/release           report/page/bundle
    report/compiled          report/page/artefacts
    report/sweep             report/page/sweep
    run_directory            runs/directory
    journal                  runs/journal
    checkpoint               runs/checkpoints
    finish                   runs/results
    events                   runs/events
    progress                 runs/listener
    trained                  runs/trained_model
    secagg/sums              secagg/secure_sums
    secagg/secure_sum        secagg/protocol_steps
    secagg/trial             secagg/attempt
    secagg/ledger            secagg/restart_state
    secagg/mean              secagg/decoding
    rounds                   training/run
    loop                     training/round_loop
    evaluation               training/evaluation
    tally                    training/round_record
    metrics                  training/metrics
    calibration              training/calibration
    calibration_exchange     training/calibration_exchange
    calibration_scores       training/calibration_scores
    link                     transport/grid_calls
    liveness                 transport/node_status
    fetches                  transport/pending_pulls
    conversation             transport/delivery
    exchange                 transport/exchange
    wrapped_grid             transport/grid_wrappers
client
    data                     data/dataset
    partition                data/partition
    share                    data/npy_files
    draws                    data/seeding
    daemon                   deployment/daemon
    operate                  deployment/operations
    node_key                 deployment/node_key
    node_log                 deployment/supernode_log
    link_check               deployment/server_probe
    flower_private           deployment/flower_patches
    budget                   deployment/budget_status
    units/units              deployment/systemd
    privacy                  privacy/charging
    private_work             privacy/noising
    private_rounds           privacy/training_by_mechanism
    private_counts           privacy/noised_evaluation
    private_training         privacy/dp_sgd
    private_release          privacy/noise_calibration
    relay                    relay/message_relay
    socket_link              relay/worker_client
    secure_work              secagg/secure_sums
    secure_answers           secagg/participant
    secure_session           secagg/session
    contribution             secagg/input_vector
    answered                 secagg/replay_guard
    own_roster               secagg/trusted_roster
    site_file                settings/site_config
    policy                   settings/policy
    policy_text              settings/policy_writer
    privacy_policy           settings/privacy_policy
    learner                  training/learner
    train                    training/local_steps
    batches                  training/batches
    state                    training/control_variates
    device                   training/device
    eager                    training/optimizers
    figures                  training/requested_counts
    calibration              training/calibration
    calibration_ranges       training/calibration_ranges
    calibration_request      training/calibration_request
    calibrated               training/calibration_replay_guard
    graph_runs               training/onnx_runs
    graph_child              training/onnx_child
    serve                    worker/process
    service                  worker/socket_server
    worker                   worker/handlers
shared
    keystream                crypto/keystream
    config_sections          config/sections
    durable                  files
    bundle                   bundle/bundle
    archive                  bundle/ustar
    manifest                 bundle/manifest
    manifest_rules           bundle/manifest_checks
    manifest_privacy         bundle/manifest_privacy
    manifest_artefacts       bundle/manifest_artefacts
    onnx_session             bundle/onnx_session
    made_up                  bundle/generated_examples
    cli                      cli/main
    command_line             cli/command
    compile/export           compile/onnx_export
    compile/gpu              compile/gpu_capability
    compile/observe          compile/activation_observer
    compile/precision        compile/quantisation
    compile/strip            compile/strip_metadata
    tolerance                bundle/tolerance
    config                   config/federation
    strategy_sections        config/strategies
    section                  config/base_section
    privacy/section          config/privacy
    privacy/combinations     config/privacy_rules
    config_file              config/reader
    config_errors            config/error_messages
    toml_file                config/home_files
    signing                  crypto/dsse
    flower_app               flower/app_bundle
    flower_private           flower/patches
    preprocess               preprocessing/steps
    schema                   preprocessing/schema
    privacy/gaussian         privacy/mechanisms/gaussian
    privacy/discrete_gaussian privacy/mechanisms/discrete_gaussian
    privacy/distributed      privacy/mechanisms/distributed
    privacy/local            privacy/mechanisms/local
    privacy/toeplitz         privacy/mechanisms/toeplitz
    privacy/adaptive_clipping privacy/mechanisms/adaptive_clipping
    privacy/sampling         privacy/mechanisms/poisson_sampling
    privacy/noised_counts    privacy/mechanisms/noised_counts
    privacy/entropy          privacy/mechanisms/csprng
    privacy/accounting       privacy/accounting/epsilon
    privacy/reckoning        privacy/accounting/adversaries
    privacy/run_terms        privacy/accounting/run_releases
    privacy/charges          privacy/accounting/charges
    privacy/ledger           privacy/ledger/ledger
    privacy/ledger_file      privacy/ledger/files
    privacy/ledger_records   privacy/ledger/records
    privacy/fitness          privacy/checks/compatibility
    privacy/example_gradients privacy/checks/per_example_gradients
    roster                   roster/roster
    roster_file              roster/draft
    secagg/agreement         secagg/key_agreement
    secagg/boxes             secagg/share_encryption
    secagg/cores             secagg/parallel
    secagg/encoding          secagg/fixed_point
    secagg/limbs             secagg/exact_counters
    secagg/layout            secagg/vector_layout
    secagg/job               secagg/request_digest
    secagg/graph             secagg/neighbour_graph
    tasks/check              tasks/dry_run
    tasks/columns            tasks/standardised_columns
    tasks/bundled            tasks/sklearn_data
    wire                     wire/frames
    packed                   wire/packed
    decode                   wire/npy
    arrays                   wire/tensors
edge
    arguments                commands/arguments
    bench                    commands/bench
    install                  commands/install
    predict                  commands/predict
    verify                   commands/verify
    row_rules                inputs/row_rules
    inputs                   inputs/reader
    csv_input                inputs/csv_rows
    npy_input                inputs/npy_rows
    installation             installation/writer
    installed                installation/folder
    record                   installation/record
    engines                  installation/engines
    qualification            installation/qualification
    runtime                  runtime/model
    choice                   runtime/choice
    rehearsal                runtime/reference_trial
    decision                 outputs/labelling
    parity                   outputs/parity
    graph                    backends/graph_file
    timing                   backends/timing
    backends/opening         backends/open_artefact
    serving/counts           serving/usage_counters
    serving/protocol         serving/inference_protocol
    serving/served           serving/loaded_model
simulations
    flower_private           flower_patches
    device                   demo_device
    preparation              federation_startup
    progress                 terminal/progress
    summary                  terminal/summary
    wording                  terminal/text
"""

#: Tests whose name is not that of one file, below tests/.
TESTS = """
client
    test_anchors                 worker/test_process_anchors
    test_hostile_bundle          deployment/test_daemon_hostile_bundle
    test_local_noise             worker/test_handlers_local_noise
    test_operate_secure          deployment/test_operations_secagg
    test_private_central         worker/test_handlers_central_noise
    test_units                   deployment/test_systemd
server
    test_masked_terms            aggregation/test_privacy_cost
    test_noised_replies          admission/test_validation_noise
    test_packed_grid             transport/test_grid_wrappers
    test_units                   deployment/test_systemd
    report/test_style            report/page/test_render_style
    secagg/test_noised_sums      secagg/test_secure_sums_noise
    secagg/test_secure_again     secagg/test_protocol_steps_restart
    secagg/test_secure_lies      secagg/test_protocol_steps_lies
shared
    test_bounded                 test_files_reading
    test_npy                     wire/test_npy_writing
    test_calibration_section     config/test_federation_calibration
    test_import_cost             cli/test_main_import_cost
    compile/test_calibration_file compile/test_calibration
    compile/test_families        compile/test_onnx_export_families
    models/test_families         models/test_models_families
    models/test_images           models/test_models_images
    models/test_tokens           models/test_models_tokens
    tasks/test_declarations      tasks/test_tasks
edge
    serving/test_limits          serving/test_server_limits
simulations
    test_audit_command           commands/test_audit
    test_calibration             test_engine_calibration
    test_calibration_resume      test_engine_calibration_resume
    test_central_simulation      test_engine_central_noise
    test_local_simulation        test_engine_local_noise
    test_poison                  test_engine_poison
    test_private_simulation      test_engine_dp_sgd
    test_resume                  test_engine_resume
    test_secure_resume           test_engine_secagg_resume
    test_secure_simulation       test_engine_secagg
    test_secure_federation       test_federation_secagg
"""

#: Names that changed: the old module, the old name, the new one.
NAMES = """
server.talk                  Talk               MemberExchange
server.tally                 Tally              RoundRecord
server.census                Census             Registry
server.attendance            Attendance         Availability
server.conversation          Conversation       Delivery
server.conversation          Watch              DeliveryEvents
server.fetches               Fetches            PendingPulls
server.link                  Link               GridClient
server.link                  Patience           Timeouts
server.liveness              Liveness           NodeStatus
server.central               Central            CentralNoise
server.secagg.trial          Trial              GroupAttempt
server.secagg.ledger         Ledger             RecoveryStore
server.secagg.outcome        Begin              SumRequest
server.secagg.outcome        Opened             UnmaskedSum
server.noised_sum            Grid               IntegerGrid
client.answered              Answered           ReplayGuard
client.privacy               Asked              ReleaseRequest
client.privacy               SitePrivacy        ChargedReplies
shared.secagg.transcript     Bundle             KeyAdvertisement
"""

#: What a module is called where the name of its file is taken.
ALIASES = {
    "fedge.edge.inputs.reader": "inputs",
    "fedge.server.aggregation.updates": "site_updates",
    "fedge.server.participants.request_content": "requests",
    "fedge.server.release.artefacts": "artefact_builds",
    "fedge.server.runs.listener": "listeners",
    "fedge.server.runs.results": "run_results",
    "fedge.client.worker.process": "worker_process",
    "fedge.shared.cli.command": "command_line",
    "fedge.shared.cli.main": "cli",
    "fedge.shared.preprocessing.steps": "preprocessing",
    "fedge.shared.privacy.accounting.epsilon": "accounting",
    "fedge.shared.roster.draft": "roster_draft",
    "fedge.shared.wire.frames": "wire",
}

#: What a new folder is for; the line of its ``__init__.py``.
ROOMS = {
    "server/admission": "Whether a site's reply is acceptable, and why not.",
    "server/aggregation": "Updates in, model out: strategies, the server's noise and what it costs. No network.",
    "server/deployment": "The resident server: its processes, certificates, known sites and queue of runs.",
    "server/participants": "Which sites there are, which are there, and asking them.",
    "server/release": "From a finished run to compiled artefacts and a signed bundle.",
    "server/report/page": "The sections of the report's page, each a file.",
    "server/runs": "A run on disk: its directory, journal, checkpoints, events and results.",
    "server/training": "The round loop: select, train, aggregate, evaluate, commit.",
    "server/transport": "Flower's Grid, with deadlines and resends; nothing about learning.",
    "client/data": "A site's examples: read, divided, drawn.",
    "client/deployment": "The processes of a site: made, started, watched, stopped.",
    "client/privacy": "A site's own noise, and the ledger that pays for it.",
    "client/relay": "The process that talks to the network, and has no data.",
    "client/secagg": "A site's part in secure aggregation.",
    "client/settings": "What the site's administrator wrote: site.toml and policy.toml.",
    "client/training": "Local training, evaluation and calibration on a site's examples.",
    "client/worker": "The process that holds the data, and has no network.",
    "shared/bundle": "The signed bundle: its format, its manifest, and how it is verified.",
    "shared/cli": "The command line's entry point, and what a sub-command is.",
    "shared/config": "The run's configuration: sections, rules, reading and messages.",
    "shared/crypto": "Signatures and keystreams.",
    "shared/flower": "Flower's bundle, and what is touched of Flower's privates.",
    "shared/preprocessing": "From raw values to what a network takes: schema and steps.",
    "shared/privacy/accounting": "What noise is worth: epsilon, against whom, and what is charged.",
    "shared/privacy/checks": "Whether a task suits a mechanism.",
    "shared/privacy/ledger": "A site's hash-chained record of what it has spent.",
    "shared/privacy/mechanisms": "The noise itself: Gaussian, discrete, local, distributed, correlated.",
    "shared/roster": "Who takes part in secure aggregation: a signed list of keys.",
    "shared/wire": "Bytes between processes: frames, packed messages, tensors.",
    "edge/commands": "The sub-commands of `fedge-edge` but `serve`.",
    "edge/inputs": "Examples from files: bounded and checked against the schema.",
    "edge/installation": "Qualified on this device, and noted: what `fedge-edge install` writes.",
    "edge/outputs": "From logits to labels, and how far two graphs' logits are apart.",
    "edge/runtime": "A verified model at work.",
    "simulations/terminal": "What a person sees in a terminal while a run goes on, and at its end.",
}

#: Files that are no modules.
OTHERS = {
    "client/units/fedge-site-relay.service": "client/deployment/fedge-site-relay.service",
    "client/units/fedge-site-worker.service": "client/deployment/fedge-site-worker.service",
    "server/units/fedge-server.service": "server/deployment/fedge-server.service",
}
_SCOPES = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda,
    ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp,
)  # fmt: skip
_TEXTS = (".py", ".md", ".toml", ".service", "Makefile", "run")
_DOTTED = re.compile(
    r"\bfrom (?P<package>fedge(?:\.\w+)*) import (?P<names>[a-z]\w*(?:, ?\w+)*)|\bfedge(?:\.\w+)+"
)
_PARENTS = re.compile(r"(Path\(__file__\)(?:\.resolve\(\))?\.parents\[)(\d+)")
_BESIDE = re.compile(r"(?m)^from \.(\w+) import")
_PATH = re.compile(
    r"\b(?:tests/)?(?:server|client|shared|edge|simulations)/[\w/]+\.(?:py|service)\b"
)


@dataclass
class Table:
    """What moves where.

    Attributes:
        modules: new dotted names by old ones.
        names: new names by (old module, old name).
        files: new paths by old ones, relative to the tree.
    """

    modules: dict[str, str] = field(default_factory=dict)
    names: dict[tuple[str, str], str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def module(self, old: str) -> str:
        """Where a module is now."""
        return self.modules.get(old, old)

    def name(self, module: str, old: str) -> str:
        """What a name of a module is called now."""
        return self.names.get((module, old), old)

    def text(self, text: str) -> str:
        """Dotted names and paths in prose, messages and strings."""
        text = _PATH.sub(lambda m: self.files.get(m[0], m[0]), text)
        return _DOTTED.sub(lambda m: self._import(m) if m["names"] else self._dotted(m[0]), text)

    def _import(self, found: re.Match[str]) -> str:
        """An import in a string: what it binds keeps its name, as nothing renames what follows."""
        package = found["package"]
        made: dict[str, list[str]] = {}
        for name in re.split(r"\s*,\s*", found["names"]):
            if f"{package}.{name}" in self.modules:
                where, _, new = self.modules[f"{package}.{name}"].rpartition(".")
            else:
                where, new = self.module(package), self.name(package, name)
            made.setdefault(where, []).append(new if new == name else f"{new} as {name}")
        return "; ".join(f"from {where} import {', '.join(n)}" for where, n in made.items())

    def _dotted(self, old: str) -> str:
        parts = old.split(".")
        for end in range(len(parts), 1, -1):
            module = ".".join(parts[:end])
            if module in self.modules:
                rest = parts[end:]
                if rest:
                    rest[0] = self.name(module, rest[0])
                return ".".join([self.modules[module], *rest])
        return old


def table(components: tuple[str, ...]) -> Table:
    """The tables above, for some components."""
    found = Table(files={o: n for o, n in OTHERS.items() if o.split("/")[0] in components})
    for component, old, new in _lines(FILES, components):
        found.modules[_module(component, old)] = _module(component, new)
        found.files[f"{component}/{old}.py"] = f"{component}/{new}.py"
        found.files[f"tests/{component}/{_test(old)}"] = f"tests/{component}/{_test(new)}"
    for component, old, new in _lines(TESTS, components):
        found.files[f"tests/{component}/{old}.py"] = f"tests/{component}/{new}.py"
    for line in filter(None, NAMES.splitlines()):
        module, old, new = line.split()
        if module.split(".")[0] in components:
            found.names[f"fedge.{module}", old] = new
    return found


def _lines(text: str, components: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    component = ""
    for line in filter(None, text.splitlines()):
        if not line.startswith(" "):
            component = line
        elif component in components:
            old, new = line.split()
            yield component, old, new


def _module(component: str, path: str) -> str:
    return f"fedge.{component}.{path.replace('/', '.')}"


def _test(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{folder}/test_{name}.py".lstrip("/")


class Rewrite:
    """One Python file, under the new names.

    Args:
        source: its text.
        module: its old dotted name; empty where nothing imports it.
        moves: what moves.
        modules: every module of the tree, by old names.
    """

    def __init__(self, source: str, module: str, moves: Table, modules: set[str]) -> None:
        self._source, self._module, self._moves, self._modules = source, module, moves, modules
        self._tree = ast.parse(source)
        lines = source.encode().splitlines(keepends=True)
        self._starts = [0]
        for line in lines:
            self._starts.append(self._starts[-1] + len(line))
        self._edits: set[tuple[int, int, str]] = set()
        #: New local names by old ones, and the module that a local name stands for.
        self._locals: dict[str, str] = {}
        self._imported: dict[str, str] = {}

    def text(self) -> str:
        """The new text."""
        self._strings()
        for node in ast.walk(self._tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fedge":
                self._import(node)
        for node in self._tree.body:
            for name in _defined(node):
                if (new := self._moves.name(self._module, name)) != name:
                    self._locals[name] = new
                    if isinstance(node, ast.ClassDef | ast.FunctionDef):
                        word = " " + name  # After `class` or `def`.
                        start = self._source.encode().index(word.encode(), self._at(node)) + 1
                        self._edits.add((start, start + len(name.encode()), new))
            if "__all__" in _defined(node) and isinstance(node, ast.Assign):
                for text in ast.walk(node.value):
                    if isinstance(text, ast.Constant) and text.value in self._locals:
                        self._replace(text, f'"{self._locals[text.value]}"')
        for node in self._tree.body:
            self._visit(node, frozenset())
        data = self._source.encode()
        for start, end, new in sorted(self._edits, reverse=True):
            data = data[:start] + new.encode() + data[end:]
        return data.decode()

    def _at(self, node: ast.stmt | ast.expr) -> int:
        return self._starts[node.lineno - 1] + node.col_offset

    def _end(self, node: ast.stmt | ast.expr) -> int:
        return self._starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)

    def _replace(self, node: ast.stmt | ast.expr, new: str) -> None:
        self._edits.add((self._at(node), self._end(node), new))

    def _strings(self) -> None:
        lines = self._source.encode().splitlines(keepends=True)
        for token in tokenize.tokenize(iter(lines).__next__):
            if token.type in (tokenize.STRING, tokenize.COMMENT):
                new = self._moves.text(token.string)
                if new != token.string:
                    row, column = token.start
                    start = self._starts[row - 1] + len(token.line[:column].encode())
                    self._edits.add((start, start + len(token.string.encode()), new))

    def _import(self, node: ast.ImportFrom) -> None:
        """One import: of modules or of names, which may now be of several packages."""
        wanted: dict[str, list[str]] = {}
        for alias in node.names:
            whole, local = f"{node.module}.{alias.name}", alias.asname or alias.name
            if whole in self._modules:
                self._imported[local] = whole
                package, _, new = self._moves.module(whole).rpartition(".")
                bound = alias.asname or (new if new == local else self._free(whole, new))
            else:
                package = self._moves.module(node.module or "")
                new = self._moves.name(node.module or "", alias.name)
                bound = alias.asname or new
            if bound != local:
                self._locals[local] = bound
            wanted.setdefault(package, []).append(new if bound == new else f"{new} as {bound}")
        indent = "\n" + " " * node.col_offset
        self._replace(
            node, indent.join(f"from {p} import {', '.join(names)}" for p, names in wanted.items())
        )

    def _free(self, module: str, new: str) -> str:
        """What to call a module here: the name of its file, unless something else is called so."""
        taken = {n.id for n in ast.walk(self._tree) if isinstance(n, ast.Name)}
        taken |= {n.arg for n in ast.walk(self._tree) if isinstance(n, ast.arg)}
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                taken |= {a.asname or a.name for a in node.names}
            taken |= set(_defined(node))
        return ALIASES[self._moves.module(module)] if new in taken else new

    def _visit(self, node: ast.AST, hidden: frozenset[str]) -> None:
        """Rename what stands for an import or a definition of this file; ``hidden`` are names of a scope's own."""
        if isinstance(node, ast.Name) and node.id in self._locals and node.id not in hidden:
            self._replace(node, self._locals[node.id])
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            self._attribute(node, node.value.id, hidden)
        elif isinstance(node, ast.Call) and len(node.args) > 1:
            self._patched(node)
        inner = hidden | _bound(node) if isinstance(node, _SCOPES) else hidden
        outside = _outside(node)
        for child in ast.iter_child_nodes(node):
            if isinstance(node, ast.ClassDef) and isinstance(child, ast.FunctionDef):
                self._visit(child, hidden)  # A method does not see the names of its class.
            else:
                self._visit(child, hidden if child in outside else inner)

    def _attribute(self, node: ast.Attribute, local: str, hidden: frozenset[str]) -> None:
        if local in self._imported and local not in hidden:
            new = self._moves.name(self._imported[local], node.attr)
            if new != node.attr:
                end = self._end(node)
                self._edits.add((end - len(node.attr.encode()), end, new))

    def _patched(self, node: ast.Call) -> None:
        """``monkeypatch.setattr(module, "Name", ...)``."""
        owner, name = node.args[:2]
        if (
            isinstance(owner, ast.Name)
            and owner.id in self._imported
            and isinstance(name, ast.Constant)
            and isinstance(name.value, str)
        ):
            new = self._moves.name(self._imported[owner.id], name.value)
            if new != name.value:
                self._replace(name, f'"{new}"')


def _defined(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _outside(node: ast.AST) -> list[ast.AST]:
    """What of a scope's node is evaluated around it: decorators, defaults, annotations, bases."""
    found: list[ast.AST] = []
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        found = [*node.decorator_list, node.args]
        found += [node.returns] if node.returns else []
    elif isinstance(node, ast.ClassDef):
        found = [*node.decorator_list, *node.bases, *node.keywords]
    elif isinstance(node, ast.AnnAssign):
        found = [node.annotation]
    return found


def _bound(scope: ast.AST) -> frozenset[str]:
    """Names that are a scope's own; imports are not, as they are renamed wherever they stand."""
    found: set[str] = set()
    arguments = getattr(scope, "args", None)
    if isinstance(arguments, ast.arguments):
        found |= {a.arg for a in ast.walk(arguments) if isinstance(a, ast.arg)}

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
            return
        if isinstance(node, _SCOPES):
            return
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        if isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            found.add(node.name)
        for child in ast.iter_child_nodes(node):
            walk(child)

    parts = getattr(scope, "generators", None) or getattr(scope, "body", [])
    for part in parts if isinstance(parts, list) else [parts]:
        walk(part.target if isinstance(part, ast.comprehension) else part)
    return frozenset(found)


def move(root: Path, components: tuple[str, ...]) -> None:
    """Move a tree in place."""
    moves = table(components)
    modules = {
        "fedge." + ".".join(path.relative_to(root).with_suffix("").parts): path
        for component in COMPONENTS
        for path in (root / component).rglob("*.py")
    }
    for path in _texts(root):
        old = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            module = next((m for m, p in modules.items() if p == path), "")
            new = Rewrite(old, module, moves, set(modules)).text()
            name = path.relative_to(root).as_posix()
            new = _beside(_deeper(new, name, moves), name, moves)
        else:
            new = moves.text(old)
        if new != old:
            path.write_text(new, encoding="utf-8")
    pairs = [(root / old, root / new) for old, new in moves.files.items() if (root / old).exists()]
    # In two steps, as one's new place may be another's old one.
    for old, _ in pairs:
        old.rename(old.with_suffix(".moving"))
    for old, new in pairs:
        new.parent.mkdir(parents=True, exist_ok=True)
        old.with_suffix(".moving").rename(new)
    for room, purpose in ROOMS.items():
        if room.split("/")[0] in components and (root / room).is_dir():
            (root / room / "__init__.py").write_text(f'"""{purpose}"""\n', encoding="utf-8")
    for folder in {old.parent for old, _ in pairs}:
        if [path.name for path in folder.iterdir() if path.name != "__pycache__"] == [
            "__init__.py"
        ]:
            (folder / "__init__.py").unlink()
    _packages(root)
    for arguments in (["check", "--select", "I", "--fix"], ["format"]):
        subprocess.run([_ruff(), *arguments, "--quiet", "."], cwd=root, check=False)


def _deeper(text: str, old: str, moves: Table) -> str:
    """``Path(__file__).parents[2]`` of a file that is now one folder deeper."""
    more = moves.files.get(old, old).count("/") - old.count("/")
    return _PARENTS.sub(lambda m: f"{m[1]}{int(m[2]) + more}", text)


def _beside(text: str, old: str, moves: Table) -> str:
    """``from .test_page import`` where one of the two files is elsewhere now."""
    home = PurePosixPath(moves.files.get(old, old)).parent

    def place(found: re.Match[str]) -> str:
        other = f"{PurePosixPath(old).parent}/{found[1]}.py"
        parts = list(PurePosixPath(moves.files.get(other, other)).with_suffix("").parts)
        up = 1
        for folder in [home, *home.parents]:
            if parts[: len(folder.parts)] == list(folder.parts):
                return f"from {'.' * up}{'.'.join(parts[len(folder.parts) :])} import"
            up += 1
        return found[0]

    return _BESIDE.sub(place, text)


def _texts(root: Path) -> Iterator[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in listed.stdout.split("\0"):
        path = root / name
        skipped = name.startswith(("tools/", "benchmarks/results/", ".src/"))
        if name.endswith(_TEXTS) and path.is_file() and not skipped:
            yield path


def _packages(root: Path) -> None:
    """The two lists of pyproject.toml."""
    folders = sorted(
        path.parent.relative_to(root).as_posix()
        for component in COMPONENTS
        for path in (root / component).rglob("__init__.py")
    )
    names = [(f"fedge.{folder.replace('/', '.')}", folder) for folder in folders]
    path = root / "pyproject.toml"
    text = path.read_text(encoding="utf-8")
    listed = "".join(f'    "{name}",\n' for name, _ in names)
    text = re.sub(r"(?s)(?<=\npackages = \[\n).*?(?=\])", listed, text, count=1)
    mapped = "".join(f'"{name}" = "{folder}"\n' for name, folder in names)
    text = re.sub(r"(?s)(?<=\[tool.setuptools.package-dir\]\n).*?(?=\n\[)", mapped, text, count=1)
    path.write_text(text, encoding="utf-8")


def _ruff() -> str:
    beside = Path(sys.executable).with_name("ruff")
    return str(beside) if beside.exists() else "ruff"


def merge(branch: str) -> None:
    """Merge a branch from before the move into the branch at hand; its last commit must hold ``BEFORE``."""
    base = _moved(BEFORE, [])
    theirs = _moved(branch, ["-p", base])
    subprocess.run(["git", "cherry-pick", "--no-commit", theirs], check=False)


def _moved(commit: str, parents: list[str]) -> str:
    """A commit's tree, moved, as a commit."""
    with tempfile.TemporaryDirectory(prefix="fedge-move-") as name:
        folder = Path(name) / "tree"
        _git("worktree", "add", "--quiet", "--detach", str(folder), commit)
        try:
            move(folder, COMPONENTS)
            _git("add", "--all", folder=folder)
            tree = _git("write-tree", folder=folder)
        finally:
            _git("worktree", "remove", "--force", str(folder))
    return _git("commit-tree", tree, *parents, "-m", f"{commit}, moved")


def _git(*arguments: str, folder: Path | None = None) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.strip()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    tree = actions.add_parser("tree", help="move a tree in place")
    tree.add_argument("folder", type=Path)
    tree.add_argument("components", nargs="*", metavar="COMPONENT", help="default: all")
    merged = actions.add_parser("merge", help="merge a branch from before into the branch at hand")
    merged.add_argument("branch")
    arguments = parser.parse_args()
    if arguments.action == "merge":
        merge(arguments.branch)
    else:
        move(arguments.folder, tuple(arguments.components) or COMPONENTS)


if __name__ == "__main__":
    main()
