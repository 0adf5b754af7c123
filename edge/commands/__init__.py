"""The sub-commands of `fedge-edge` but `serve`."""
