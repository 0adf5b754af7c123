"""From a finished run to compiled artefacts and a signed bundle."""
