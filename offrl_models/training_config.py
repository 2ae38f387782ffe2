"""How every candidate is trained, as the key `training` of a pipeline says it."""

from typing import Literal

from pydantic import Field, model_validator

from offrl_models.logs.contract import Strict
from offrl_models.optimizer import Schedule


class TrainingConfig(Strict):
    """How every candidate is trained."""

    gradient_steps: int = Field(default=10_000, ge=1)
    batch_size: int = Field(default=256, ge=1)
    schedule: Schedule = "constant"  # of the learning rates
    warmup_steps: int = Field(default=0, ge=0)  # gradient steps in which the learning rates rise to what they are
    clip_norm: float | None = Field(default=None, gt=0)  # longest gradient of a network, per seed
    precision: Literal["32", "bf16"] = "32"  # of matrix products
    checkpoints: int = Field(
        default=1, ge=1, le=20
    )  # candidates that each training leaves, evenly spaced; 1 is the last alone
    processes: int = Field(default=1, ge=1)  # that train a candidate together, each its share of the rows of a batch
    compile: bool = False  # machine code for losses and gradients, which takes a while to make

    @model_validator(mode="after")
    def _checkpoints_differ(self) -> "TrainingConfig":
        if self.checkpoints > self.gradient_steps:
            raise ValueError(f"{self.checkpoints} checkpoints need as many gradient_steps, not {self.gradient_steps}")
        return self

    @model_validator(mode="after")
    def _shares_are_equal(self) -> "TrainingConfig":
        if self.batch_size % self.processes:
            raise ValueError(
                f"{self.processes} processes cannot share a batch_size of {self.batch_size} evenly; make it a multiple of them"
            )
        return self

    @property
    def kept_after(self) -> list[int]:
        """Gradient steps after which weights are kept; the last are all of them."""
        return [self.gradient_steps * place // self.checkpoints for place in range(1, self.checkpoints + 1)]

    @property
    def of_rows(self) -> list[str]:
        """Keys that are set and want losses of the rows of a batch alone."""
        return [key for key, wanted in (("processes", self.processes > 1), ("compile", self.compile)) if wanted]
