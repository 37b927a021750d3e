"""Families of models that are not BERT's: each is loaded, encoded and read as transformers reads it by itself."""

import copy

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from engine.batch import Batch
from engine.data.encoded import EncodedSplit
from engine.data.encoding import Encoding
from engine.data.splits import Task
from engine.errors import UserError
from engine.losses.domain_head import widen
from engine.models import families
from engine.models.checkpointing import checkpointed
from engine.models.encoder_layers import encoder_layers
from engine.models.families import PLAIN, family, longest, without_cache
from engine.models.features import InnerStates
from engine.models.load import ModelSource, load_model
from engine.models.network import Encoder
from engine.models.student_layers import keep_layers

WORDS = [*("[PAD]", "[UNK]", "[CLS]", "[SEP]"), *"abcdefghijklmnopqrstuvwxyz"]
BASE = {"vocab_size": 40, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
         "max_position_embeddings": 24, "initializer_range": 0.3}  # fmt: skip
OWN = {
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
    "bart": {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24,
             "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "max_position_embeddings": 24, "init_std": 0.3,
             "decoder_start_token_id": 3, "forced_eos_token_id": 3},
    "xlnet": {"d_model": 16, "n_layer": 3, "n_head": 2, "d_inner": 24, "initializer_range": 0.3},
    "xlm": {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 24, "init_std": 0.3, "pad_index": 0},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16, "init_std": 0.3},
    "distilbert": {"dim": 16, "hidden_dim": 24, "n_layers": 3, "n_heads": 2, "max_position_embeddings": 24},
    "funnel": {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8},
    "longformer": {"attention_window": [4, 4]},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}  # fmt: skip


def tiny(kind, **settings):
    torch.manual_seed(0)
    sizes = {} if kind in ("t5", "bart", "xlnet", "xlm", "distilbert", "funnel") else SIZES
    config = CONFIG_MAPPING[kind](**BASE | sizes | OWN.get(kind, {}) | settings)
    return AutoModelForSequenceClassification.from_config(config).eval()


def tokenizer(pad="[PAD]", types=False, second=1, side="right"):
    """Letters with [CLS] a [SEP] b [SEP]; the tokens of b are of the type `second`."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=f"[CLS] $A [SEP] $B:{second} [SEP]:{second}",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, unk_token="[UNK]", cls_token="[CLS]", eos_token="[SEP]",
                                   sep_token="[SEP]", model_input_names=names, padding_side=side)  # fmt: skip


def loaded(module, words, folder):
    module.save_pretrained(folder)
    words.save_pretrained(folder)
    task = Task("classification", ("x", "y", "z"), False)
    return load_model(ModelSource(str(folder), "own", "local", str(folder)), task, list, 0)


def batch(module, length=9):
    """Rows of different length with what this module's forward takes."""
    ids = torch.randint(5, 40, (3, length), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(length) < torch.tensor([[length], [1], [length // 2]])).long()
    ids = torch.where(mask == 1, ids, module.config.pad_token_id)
    return Batch(torch.zeros(3).long(), {"own": {"input_ids": ids, "attention_mask": mask}})


# As the exported model reads a text alone

TYPED = {"types": True}
ALONE = [
    ("gpt2", {"pad_token_id": 9}, {}),  # a letter of the texts: its classifier would read other tokens than the last
    ("llama", {"pad_token_id": None}, {"pad": None}),  # texts then end in the token for padding
    ("opt", {"pad_token_id": 9}, {"side": "left"}),
    ("gpt2", {}, {}),
    ("xlm", {}, {}),
    ("roberta", {"type_vocab_size": 1, "pad_token_id": 1}, TYPED),
    ("bert", {}, TYPED),
    ("xlnet", {}, TYPED),
    ("fnet", {}, TYPED),
    ("t5", {}, {}),
    ("bart", {}, {}),
]


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize(("kind", "settings", "words"), ALONE)
def test_logits_are_those_of_the_exported_model_alone(kind, settings, words, pair, tmp_path):
    words = tokenizer(**{"pad": "[UNK]" if kind == "roberta" else "[PAD]"} | words)
    own = loaded(tiny(kind, **settings), words, tmp_path)
    texts, pairs = ["a b c d e f g", "f", "h i e"], ["q r", "s", "t u v w"]
    masked = "attention_mask" in families.inputs_of(own.module)
    encoding = Encoding.of(own.tokenizer, min(20, own.max_length), family(own.module).padding, not masked)
    rows = Dataset.from_dict({"text": texts, "label": [0, 1, 2]} | ({"pair": pairs} if pair else {}))
    split = EncodedSplit(rows, [encoding], "x" * 16, tmp_path)
    got = Encoder("own", own.module, encoding.key)(split.batch([0, 1, 2])).logits
    own.module.save_pretrained(tmp_path)
    own.tokenizer.save_pretrained(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    alone = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    for i, logits in enumerate(got):
        given = words(texts[i], *([pairs[i]] if pair else []), return_tensors="pt",
                      **({} if masked else {"padding": "max_length", "max_length": 20}))  # fmt: skip
        if not masked:
            del given["attention_mask"]
        torch.testing.assert_close(logits, alone(**given).logits[0], rtol=0, atol=1e-5)
    assert got.std(0).min() > 1e-3, "texts are told apart"


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_an_encoder_that_is_a_decoder_keeps_its_causal_mask(kind):
    module = tiny(kind, is_decoder=True)
    given = batch(module)
    assert family(module) is PLAIN
    for higher in (False, True):
        got = Encoder("own", module, "own")(given, higher=higher).logits
        torch.testing.assert_close(got, module(**given.inputs["own"]).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "gpt2", "modernbert", "t5", "bart", "xlm"])
def test_a_family_without_a_record_runs_as_its_plain_module(kind, monkeypatch):
    """Its layers are found where they stand in lists of their number; of T5 and BART those of both stacks."""
    module = tiny(kind)
    known = encoder_layers(module)
    given = batch(module)
    given.inputs["own"]["input_ids"][:, -1] = 3
    monkeypatch.setattr(families, "FAMILIES", {})
    assert set(encoder_layers(module)) >= set(known)
    for higher in (False, True):
        got = Encoder("own", module, "own")(given, higher=higher).logits
        torch.testing.assert_close(got, module(**given.inputs["own"]).logits, rtol=0, atol=1e-5)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    with pytest.raises(UserError, match="gives ids up to 29, and the model has embeddings for 20 tokens"):
        loaded(tiny("bert", vocab_size=20), tokenizer(), tmp_path)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [*((k, 22) for k in ("roberta", "mpnet", "roberta-prelayernorm", "data2vec-text", "xmod", "longformer")),
     *((k, 24) for k in ("bert", "gpt2", "opt", "bart")), ("xlnet", None), ("t5", None)],
)  # fmt: skip
def test_how_many_tokens_a_model_reads(kind, expected):
    """So many, and no more."""
    module = tiny(kind, **{"pad_token_id": 1} if expected == 22 else {})
    assert longest(module) == expected

    def read(length):
        ids = torch.full((1, length), 7)
        ids[0, -1] = 3
        return Encoder("own", module, "own")(
            Batch(ids[0, :1], {"own": {"input_ids": ids, "attention_mask": ids * 0 + 1}})
        )

    assert read(expected or 60).logits.isfinite().all()
    if expected is not None and kind != "longformer":  # which pads its texts itself, up to what its windows need
        with pytest.raises((IndexError, RuntimeError)):
            read(expected + 1)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "xlm"])
def test_checkpointed_layers_read_no_cache(kind):
    module = tiny(kind)
    given, network, found = batch(module), Encoder("own", module, "own"), []
    for checkpoints in (False, True):
        module.zero_grad()
        if checkpoints:
            with checkpointed(module):
                loss = network(given, higher=True).logits.square().sum()
        else:
            loss = module(**given.inputs["own"]).logits.square().sum()
        loss.backward()
        found.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# States


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "opt", "xlnet", "mpnet", "modernbert"])
def test_the_states_that_are_compared_are_those_that_the_classifier_reads(kind):
    """The only token of a text whose last state has a gradient."""
    module, last = tiny(kind), []
    given, network = batch(module), Encoder("own", module, "own")
    if kind == "xlnet":
        given.inputs["own"] = {name: t.flip(1) for name, t in given.inputs["own"].items()}
    module.base_model.register_forward_hook(lambda _, args, out: last.append(out[0]))
    out = module(**given.inputs["own"], output_hidden_states=True)
    (slopes,) = torch.autograd.grad(out.logits.square().sum(), last)
    rows, places = slopes.any(-1).nonzero(as_tuple=True)
    assert rows.tolist() == [0, 1, 2]
    with network.giving(InnerStates(token=(1, 2))):
        got = network(given, higher=True).features
    for n, layer in enumerate((1, 2)):
        torch.testing.assert_close(got[:, n], out.hidden_states[layer][rows, places], rtol=0, atol=1e-5)


def test_a_head_for_every_domain_is_exported_as_it_is(tmp_path):
    """Causal models have heads without bias."""
    module = tiny("gpt2")
    given = batch(module).inputs["own"]
    module.config.id2label = dict(enumerate("xyz"))
    widen(module, 3, ["books", "dvd"], 0)
    expected = module(**given).logits
    module.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.state_dict().keys() == module.state_dict().keys() and torch.equal(loaded(**given).logits, expected)


# Some of a model's layers

KEPT = [
    *((kind, {}) for kind in ("bert", "distilbert", "gpt2", "llama", "opt", "t5", "bart", "xlnet")),
    ("modernbert", {"layer_types": ["full_attention", "full_attention", "sliding_attention"], "local_attention": 4}),
    ("longformer", {"attention_window": [4, 4, 8]}),
    ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 2}),
]


def deep(kind, **settings):
    """Three layers."""
    counts = {"num_hidden_layers": 3} if kind not in OWN or kind in ("opt", "longformer", "gemma3_text") else {}
    counts |= {"t5": {"num_layers": 3}, "bart": {"encoder_layers": 3, "decoder_layers": 3}}.get(kind, {})
    return tiny(kind, **counts | settings)


@pytest.mark.parametrize(("kind", "settings"), KEPT)
def test_layers_that_are_kept_compute_what_they_did(kind, settings, tmp_path):
    """And so does the plain model that is exported. The whole one skips the others by hooks."""
    module = deep(kind, **settings)
    given, whole = batch(module).inputs["own"], copy.deepcopy(module)
    given = {name: t[:, :7] for name, t in given.items()}
    given["input_ids"][:, -1], given["attention_mask"][:] = 3, 1
    for layer in encoder_layers(whole)[1::3]:
        layer.register_forward_hook(
            lambda _, args, out: (args[0], *out[1:]) if isinstance(out, tuple) else args[0])  # fmt: skip
    expected = whole(**given, **without_cache(whole)).logits
    kept = keep_layers(module, [0, 2])
    kept.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    for found in (kept, loaded):
        torch.testing.assert_close(found(**given).logits, expected, rtol=0, atol=1e-5)
    assert len(encoder_layers(loaded)) == 2 * (1 + (kind in ("t5", "bart"))) and not kept.training


def test_albert_repeats_its_one_layer_less_often_and_xlm_loses_parts_of_all_lists():
    for kind, names in (("albert", []), ("xlm", ["attentions", "layer_norm1", "ffns", "layer_norm2"])):
        module = deep(kind, **{"n_layers": 3} if kind == "xlm" else {"embedding_size": 16})
        given, state = batch(module).inputs["own"], {n: t.clone() for n, t in module.state_dict().items()}
        kept = keep_layers(module, [2, 1])
        assert kept.config.num_hidden_layers == 2 and kept(**given).logits.isfinite().all()
        if kind == "albert":
            expected = copy.deepcopy(kept)
            expected.load_state_dict(state)
            assert torch.equal(kept(**given).logits, expected(**given).logits)
        for name in names:
            for new, old in ((0, 2), (1, 1)):
                for key, t in kept.transformer.get_submodule(f"{name}.{new}").state_dict().items():
                    assert torch.equal(t, state[f"transformer.{name}.{old}.{key}"])


@pytest.mark.parametrize(
    ("kind", "settings", "layers", "said"),
    [
        *(("bert", {}, wrong, "the student has layers 0 to 2, each usable once") for wrong in ([], [3], [-1], [0, 0])),
        ("t5", {}, [1, 2], "1,2 does not fit a t5, .* begin with layer 0"),
        ("modernbert", {}, [2, 0], "2,0 does not fit a modernbert, .* begin with layer 0"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, [0, 2], "something else at another place"),
        ("bart", {"decoder_layers": 2}, [0, 1], "the student has 3 and 2"),
        ("funnel", {"block_sizes": [1, 1, 1]}, [0, 1], "does not know the layers of a funnel"),
    ],
)
def test_layers_that_cannot_be_kept(kind, settings, layers, said):
    with pytest.raises(UserError, match=f"--student-layers.*{said}"):
        keep_layers(deep(kind, **settings), layers)
