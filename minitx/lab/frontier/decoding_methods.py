"""The methods of ``minitx frontier decoding``: plain decoding, and one entry for each setting of a
technique that skips whole passes of the model, or whole answers.

Every technique of the levels "decode" and "answer" has a method here, or stands in ``LEFT_OUT``. A
method with a store (its parts have ``forget``) is also measured on prompts that it has seen before.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from minitx.lab.frontier.knobs import Method
from minitx.second_model import SMALL
from minitx.technique import apply, find
from minitx.tree import Part


@dataclass(frozen=True)
class Way(Method):
    """A way to decode: a technique at fixed options. also: techniques beside it, with options."""

    also: Mapping[str, dict] = field(default_factory=dict)

    @property
    def techniques(self) -> dict[str, dict]:
        """All of its techniques, with their options; none is plain decoding."""
        return {} if self.wanted == PLAIN else {self.wanted: self.options, **self.also}

    @property
    def exact(self) -> bool:
        return all(find(name).exact for name in self.techniques)

    def apply(self, lm: Part, value: None = None) -> Part:
        return apply(lm, self.techniques) if self.techniques else lm

    def with_small(self, small: str) -> "Way":
        """The method with this second model, wherever an option names ``SMALL``."""

        def named(options: dict) -> dict:
            return {name: small if value == SMALL else value for name, value in options.items()}

        also = {name: named(options) for name, options in self.also.items()}
        return replace(self, options=named(self.options), also=also)


def way(name: str, technique: str, options: dict, **also: dict) -> Way:
    return Way(name, None, options, technique, also=also)


PLAIN = "plain"
DRAFT = {"draft": SMALL}

METHODS = (
    Way(PLAIN, None, make=lambda lm, value: lm),
    # Draft and verify: so many tokens in each round, or until the draft is unsure.
    way("speculative gamma=2", "speculative", DRAFT | {"gamma": 2, "stop": 0.0}),
    way("speculative gamma=4", "speculative", DRAFT | {"gamma": 4, "stop": 0.0}),
    way("speculative gamma=8", "speculative", DRAFT | {"gamma": 8, "stop": 0.0}),
    way("speculative stop", "speculative", DRAFT),
    way("speculative adapt", "speculative", DRAFT | {"adapt": True}),
    way("speculative draft=self", "speculative", {"draft": "self"}),
    way("self_speculative", "self_speculative", {}),
    way("prompt_lookup", "prompt_lookup", {}),
    way("prompt_lookup adapt", "prompt_lookup", {"adapt": True}),
    way("jacobi", "jacobi", {}),
    way("lookahead", "lookahead", {}),
    way("lookahead authors", "lookahead", {"preset": "authors"}),
    # A second model helps, or answers instead.
    way("big_little", "big_little", {"small": SMALL}),
    way("big_little exact", "big_little", {"small": SMALL, "preset": "exact"}),
    way("ensemble", "ensemble", {"member": SMALL}),
    way("majority_vote", "majority_vote", {}),
    way("router", "router", {"small": SMALL}),
    way("cascade", "cascade", {"small": SMALL}),
    # With a store: also measured on prompts that were seen before.
    way("prefix_cache", "prefix_cache", {}),
    way("prefix_cache + draft", "prefix_cache", {}, speculative=DRAFT),
    way("answer_cache", "answer_cache", {"file": "memory"}),
    way("semantic_cache", "semantic_cache", {}),
)

# Techniques that have no method, and why.
LEFT_OUT = {
    "padding_skip": "changes batches only, which minitx batch measures",
}
