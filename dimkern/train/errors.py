"""What can go wrong in a run and is the user's to put right."""


class SettingError(ValueError):
    """A setting that cannot be used: which one, and why (what came, what is accepted)."""

    def __init__(self, setting: str, why: str) -> None:
        super().__init__(f"{setting}: {why}")
        self.setting = setting
        self.why = why


class TrainingStopped(RuntimeError):
    """The loss or a weight is no longer finite; the message says where, and what to try."""
