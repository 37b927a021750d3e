"""Which states of a student and of its teachers a feature loss compares, and what the student learns for that."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from engine.config import Config
from engine.errors import UserError
from engine.losses.domain_head import DomainProjection
from engine.methods import METHODS
from engine.models.families import LEAN, family, model_type, state_read
from engine.models.features import InnerStates, all_layers, attach, detach, layers_to_match, projection
from engine.models.network import Network


@dataclass
class Matching:
    """The inner states of the student and of each teacher."""

    student: InnerStates
    teachers: list[InnerStates]
    seed: int

    @contextmanager
    def between(self, student: Network, teachers: Sequence[Network]):
        """For the body the networks give what is matched; the student has projections to the teachers' width, which go again.

        Its learner must be made in the body.
        """
        module, width = student.module, teachers[0].module.config.hidden_size
        own = module.config.hidden_size
        device = next(module.parameters()).device
        with ExitStack() as stack:
            stack.callback(detach, module)
            if self.student.hidden or (self.student.token and own != width):
                attach(module, "hidden", projection(own, width, self.seed).to(device))
            if self.student.domain:
                attach(module, "domain", DomainProjection(projection(own, width, self.seed + 1)).to(device))
            for network, inner in zip([student, *teachers], [self.student, *self.teachers], strict=True):
                stack.enter_context(network.giving(inner))
            yield


def match(config: Config, student: Network, teachers: Sequence[Network]) -> Matching:
    """What --feature-loss compares, and with meta-teachers the models' domain features besides.

    Raises UserError where two models' states cannot be compared, or cannot be had in a run with these settings.
    """
    method, own, theirs = config.method, [], []
    for teacher in teachers:
        if teacher.encoding != student.encoding:
            raise UserError(
                f"--feature-loss {method.feature_loss} compares states of the same tokens, but {teacher.name} has another "
                f"tokenizer than the student {student.name}; use --feature-loss none.")  # fmt: skip
        if method.feature_loss == "tinybert":
            _check_tinybert(student, teacher)
        else:
            _check_patient(student, teacher)
        depths = [network.module.config.num_hidden_layers for network in (student, teacher)]
        if method.feature_loss == "patient":
            pair = [InnerStates(token=tuple(layers)) for layers in layers_to_match(*depths, method.feature_map)]
        else:
            pair = all_layers(*depths, method.feature_map)
        own.append(pair[0])
        theirs.append(pair[1])
    _check_alike(config, teachers)
    if method.feature_loss == "tinybert":
        _check_run(config)
    if method.feature_loss == "tinybert" and METHODS[method.method].meta_teachers:
        own, theirs = ([replace(inner, domain="feature") for inner in each] for each in (own, theirs))
    return Matching(own[0], theirs, config.run.seed)


def _check_patient(*networks: Network) -> None:
    for network in networks:
        if state_read(network.module) is None:
            raise UserError(
                f"--feature-loss patient compares states of the one token that a classifier reads, and {network.name}, a "
                f"{model_type(network.module)}, reads several, or it is not known which; use --feature-loss none.")  # fmt: skip


def _check_tinybert(student: Network, teacher: Network) -> None:
    for network in (student, teacher):
        if family(network.module).lean is None:
            raise UserError(
                f"--feature-loss tinybert reads the attention of {', '.join(LEAN)}, and {network.name} is a "
                f"{model_type(network.module)}; use --feature-loss patient or none.")  # fmt: skip
    heads = [network.module.config.num_attention_heads for network in (student, teacher)]
    if heads[0] != heads[1]:
        raise UserError(
            f"--feature-loss tinybert compares attention head by head, but the student {student.name} has {heads[0]} heads "
            f"and {teacher.name} {heads[1]}; use --feature-loss patient or none, or models with as many heads.")  # fmt: skip


def _check_alike(config: Config, teachers: Sequence[Network]) -> None:
    """One projection serves all teachers; patient features of models of one width need none."""
    widths = {teacher.name: teacher.module.config.hidden_size for teacher in teachers}
    if len(set(widths.values())) > 1:
        given = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise UserError(f"--feature-loss {config.method.feature_loss} projects the student to one width, and the teachers have "
                        f"several ({given}); use teachers of one width, or --feature-loss none.")  # fmt: skip


def _check_run(config: Config) -> None:
    if config.run.compile:
        raise UserError(
            "--compile hides the attention scores that --feature-loss tinybert compares; leave one of them out."
        )
    if config.method.checkpointing != "none" and METHODS[config.method.method].teachers == "learning":
        raise UserError(f"--checkpointing {config.method.checkpointing} does not keep the attention scores that --feature-loss "
                        "tinybert compares; leave one of them out.")  # fmt: skip
