"""Step 3: encode the data, each domain's for those who learn from it."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import Config
from engine.data.encoded import EncodedSplits
from engine.data.noise import Noise
from engine.data.splits import Splits
from engine.models.load import ModelSource
from engine.run import choices
from engine.run.domains import DomainPlan
from engine.run.inputs import Inputs
from engine.run.members import Models
from engine.screen.console import Console


@dataclass
class Examples:
    """Encoded data of a run.

    splits      what the student learns from and is measured on, as texts
    encoded     the same, encoded
    by_domains  all that is read, by the domains that it is of
    noise       in the student's training batches, or None
    """

    splits: Splits
    encoded: EncodedSplits
    domains: DomainPlan
    by_domains: dict[frozenset[int], EncodedSplits]
    noise: Noise | None

    @property
    def everything(self) -> EncodedSplits:
        return self.by_domains[self.domains.everything]

    def of_teacher(self, source: ModelSource) -> EncodedSplits:
        """What the teacher of `source` is prepared on."""
        return self.by_domains[self.domains.of_teacher(source)]


def encode(config: Config, inputs: Inputs, models: Models, console: Console) -> Examples:
    """Raises UserError for domains without examples, and for noise that a tokenizer has no token for."""
    splits, plan = inputs.splits, inputs.domains
    texts = sum(map(len, [*splits.train, splits.quiz, splits.validation, splits.test]))
    count = len(models.encodings)
    console.say(f"Tokenising {texts:,} texts, {count} tokenizer{'s' * (count != 1)} ...")
    by_domains: dict[frozenset[int], EncodedSplits] = {}
    for domains in {plan.everything, plan.student, *(plan.of_teacher(m.source) for m in models.teachers)}:
        by_domains[domains] = EncodedSplits.of(
            plan.only(splits, domains), models.encodings, inputs.cache / "tokens", config.data.length_buckets,
            config.optim.batch_size,
        )  # fmt: skip
    own, encoded = plan.only(splits, plan.student), by_domains[plan.student]
    readers, noise = choices.noise_readers(config, models.student.network, models.taught(), console.say), None
    if readers:
        noise = Noise(own.train[0], models.encodings, encoded.hashes[0], inputs.cache / "tokens", readers,
                      config.method.noise_kind, config.run.seed)  # fmt: skip
    return Examples(own, encoded, plan, by_domains, noise)
