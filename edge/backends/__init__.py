"""What runs an artefact on this device, which of them to take, and how to try one without risk."""
