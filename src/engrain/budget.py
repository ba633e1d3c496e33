"""`Budget`: what one episode may use before it is ended."""

from __future__ import annotations

from dataclasses import dataclass

from engrain.trajectory import Trajectory


@dataclass(frozen=True)
class Budget:
    """Its limits are looked at between turns and between calls."""

    steps: int = 64
    completion_tokens: int = 8192
    """Counted where the policy reports token ids; elsewhere unlimited."""
    seconds: float = 300.0
    """Time spent by the policy and the tools on this episode."""

    def exhausted(self, trajectory: Trajectory) -> str:
        """The name of the limit that is reached, or nothing."""
        if trajectory.steps >= self.steps:
            return "steps"
        if sum(len(message.token_ids or ()) for message in trajectory.messages) >= self.completion_tokens:
            return "completion_tokens"
        return "seconds" if self.out_of_time(trajectory) else ""

    def out_of_time(self, trajectory: Trajectory) -> bool:
        return sum(message.seconds or 0.0 for message in trajectory.messages) >= self.seconds


UNTIMED = Budget(seconds=86_400.0)
"""For measurements: success must not depend on how busy the machine is, nor on what else is in the batch."""
