"""The corpus, its split, its blocks, the loss on them, and the n-gram model the base model is measured against."""

import itertools

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples import corpus
from examples.ngram import KneserNey


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_QST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<end>", *alphabet])}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


def test_python_files_keeps_what_is_usable(tmp_path, cache):
    good = "x = 1\n" * 50
    for name, data in {
        "a.py": good.encode(),
        "sub/b.py": (good + "y = 'é'\r\n").encode(),
        "small.py": b"x = 1\n",
        "large.py": good.encode() * 2000,
        "latin.py": (good + "# é\n").encode("latin-1"),
        "broken.py": (good + "print 'x'\n").encode(),
        "notes.txt": good.encode(),
        "skip/c.py": good.encode(),
        "skipped.py": good.encode(),
    }.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_bytes(data)
    for _ in range(2):  # the second time, what does not parse is known from the cache
        files = corpus.python_files(tmp_path / "root", exclude=["skip"])
        assert [f.name for f in files] == ["a.py", "skipped.py", "sub/b.py"]
        assert files[-1].text == good + "y = 'é'\n"
    with pytest.raises(ValueError, match=r"root='.*nowhere' is not a folder"):
        corpus.python_files(tmp_path / "nowhere")


def test_split_of_the_standard_library_is_disjoint_and_deterministic():
    files = corpus.stdlib_files()
    train, held = corpus.split(files)
    assert {f.name for f in train}.isdisjoint(f.name for f in held)
    assert {f.text for f in train}.isdisjoint(f.text for f in held)
    assert 0.02 < len(held) / len(files) < 0.08
    assert (train, held) == corpus.split(files[::-1])
    # By the name alone: a file stays on its side whatever files are beside it, and on every machine.
    assert corpus.split(held)[0] == [] and corpus.split(train[::3])[1] == []
    names = [corpus.SourceFile(f"package/module_{i}.py", str(i)) for i in range(60)]
    assert [f.text for f in corpus.split(names)[1]] == ["2", "23", "43"]


def test_split_drops_copies_and_names_a_bad_share():
    files = [corpus.SourceFile(f"{i}.py", f"text {i % 7}") for i in range(100)]
    train, held = corpus.split(files, held_out=0.5)
    assert sorted(f.text for f in train + held) == [f"text {i}" for i in range(7)]
    with pytest.raises(ValueError, match=r"held_out=1\.5 is not a share"):
        corpus.split(files, held_out=1.5)


def test_tokens_are_the_files_with_an_end_after_each(cache, byte_tokenizer):
    files = [corpus.SourceFile("a.py", "x = '<end>'\n"), corpus.SourceFile("b.py", "y = 'é'")]
    ids = corpus.tokens(files, byte_tokenizer)
    assert ids.ndim == 1 and ids.dtype == np.int32
    # The text that spells the special token stays text: only the two ends we added are that token.
    assert np.flatnonzero(ids == byte_tokenizer.eos_token_id).tolist() == [12, 21]
    assert byte_tokenizer.decode(ids[:12].tolist()) == files[0].text
    stored = list(cache.glob("tokens-*.npy"))
    assert len(stored) == 1 and not list(cache.glob("*.tmp"))
    np.save(stored[0], ids + 1)  # the second call reads what is stored
    assert (corpus.tokens(files, byte_tokenizer) == ids + 1).all()
    assert len(corpus.tokens(files[:1], byte_tokenizer)) == 13  # other files, other key


def test_a_failed_write_leaves_nothing_behind(cache, byte_tokenizer, monkeypatch):
    def half_a_file(file, value):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "save", half_a_file)
    with pytest.raises(OSError, match="disk full"):
        corpus.tokens([corpus.SourceFile("a.py", "x")], byte_tokenizer)
    assert list(cache.iterdir()) == []


def test_blocks():
    rows = corpus.blocks(np.arange(103, dtype=np.int32), 10)
    assert rows.shape == (10, 10) and rows.dtype == torch.int64
    assert rows.flatten().tolist() == list(range(100))
    assert corpus.blocks(np.arange(103), 10, limit=3)[:, 0].tolist() == [0, 40, 90]
    item = corpus.BlockDataset(rows)[4]
    assert item["input_ids"].tolist() == item["labels"].tolist() == list(range(40, 50))
    with pytest.raises(ValueError, match="length=1 is too short"):
        corpus.blocks(np.arange(9), 1)


def test_held_out_loss_is_the_sum_over_the_count():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = LlamaForCausalLM(config).train()
    with torch.no_grad():
        model.lm_head.weight.mul_(50)  # far from uniform, so that batches differ
    rows = torch.randint(0, 32, (5, 9))
    expected = sum(model(input_ids=row[None], labels=row[None]).loss.item() for row in rows) / 5
    for batch_size in (1, 2, 5):  # 2 leaves a short last batch
        assert corpus.held_out_loss(model, rows, batch_size) == pytest.approx(expected, abs=1e-5)
    assert model.training
    with pytest.raises(ValueError, match="rows is empty"):
        corpus.held_out_loss(model, rows[:0])


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_n_gram_probabilities_sum_to_one(order):
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 7, 400)
    ids[::3] = 2
    model = KneserNey(ids, 8, order)  # token 7 never seen
    for history in (ids[10:14], ids[-4:], [7, 7, 7, 7], [0, 7, 1, 2], ids[:1], []):
        after = [np.exp(model.log_probs(np.append(history, w).astype(int))[-1]) for w in range(8)]
        assert sum(after) == pytest.approx(1.0) and min(after) > 0


def test_n_gram_against_the_formula_written_out():
    """The bigram, spelled out with dictionaries: p(w|v) = (c(vw) - d) / c(v) + left(v) * p(w)."""
    ids = np.random.default_rng(1).geometric(0.3, 500).clip(max=9)
    model = KneserNey(ids, 10, order=2)
    pairs = list(itertools.pairwise(ids.tolist()))
    counts = {pair: pairs.count(pair) for pair in set(pairs)}
    before = {w: max(1, len({v for v, x in counts if x == w})) for w in set(ids.tolist())}

    def discounts(values):
        n = [None, *(max(1, sum(v == c for v in values)) for c in (1, 2, 3, 4))]
        y = n[1] / (n[1] + 2 * n[2])
        raw = [c - (c + 1) * y * n[c + 1] / n[c] for c in (1, 2, 3)]
        return [0.0, *(min(max(d, 0.1), 0.9 * c) for c, d in enumerate(raw, 1))]

    d1, d2 = discounts(list(before.values())), discounts(list(counts.values()))
    total = sum(before.values())
    rest = sum(d1[min(c, 3)] for c in before.values()) / total
    single = {w: max(before.get(w, 0) - d1[min(before.get(w, 0), 3)], 0) / total + rest / 10 for w in range(10)}
    for v, w in [(1, 1), (1, 2), (2, 9), (9, 8), (3, 3)]:
        after = [c for (a, _), c in counts.items() if a == v]
        c = counts.get((v, w), 0)
        expected = (c - d2[min(c, 3)]) / sum(after) + sum(d2[min(a, 3)] for a in after) / sum(after) * single[w]
        assert np.exp(model.log_probs(np.array([v, w])))[1] == pytest.approx(expected)


def test_n_gram_loss_counts_the_tokens_of_the_blocks():
    ids = np.random.default_rng(2).integers(0, 5, 300)
    model = KneserNey(ids, 5, order=3)
    held = np.random.default_rng(3).integers(0, 5, 47)
    each = -model.log_probs(held)
    kept = [i for i in range(40) if i % 10]
    assert model.loss(held, 10) == pytest.approx(each[kept].mean())
    assert model.loss(held, 10, np.array([2])) == pytest.approx(each[21:30].mean())
    with pytest.raises(ValueError, match="outside 0 to vocab - 1 = 3"):
        KneserNey(ids, 4)


def test_a_kept_model_is_made_once_and_whole(cache):
    calls = []

    def save(folder):
        folder.mkdir()
        (folder / "weights").write_text("half")
        calls.append(folder)
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        corpus.kept_model("some", save)
    assert list((cache / "models").iterdir()) == []
    for _ in range(2):
        assert corpus.kept_model("some", save) == cache / "models" / "some"
    assert len(calls) == 2 and [path.name for path in (cache / "models").iterdir()] == ["some"]
