"""What can be wrong with a checkpoint, a manifest or a zoo: every message is meant for the user."""


class ZooError(Exception):
    """Base of all user-facing errors of the zoo: one message that says what to do."""


class CheckpointError(ZooError):
    """An input folder (a checkpoint or a PEFT adapter) is incomplete, corrupt or inconsistent."""


class UnsupportedModelError(CheckpointError):
    """An input folder is sound, but asks for something blockzoo does not compute."""


class ManifestError(ZooError):
    """`manifest.json` is not a manifest of the expected schema."""


class StoreError(ZooError):
    """A file of the zoo is missing or corrupt, or the zoo is locked by another writer."""
