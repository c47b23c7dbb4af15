"""Fetching: offline errors, wrong files, no code run, and the text itself."""

import pytest

from falcon_relu import corpora
from falcon_relu.errors import FalconError


def online(call):
    try:
        return call()
    except FalconError as error:
        pytest.skip(f"pip cannot reach a registry: {error}")


def test_wiki_markup():
    wiki = (
        "{{Infobox|a={{b}}}}'''Falcons''' are [[bird of prey|raptors]] of the [[genus]].<ref name=x>{{cite}}</ref>\n"
        "== See also ==\n[[File:f.jpg|thumb|A [[falcon]]]][http://e.org A site] &amp; more<!-- no -->\n"
        "{| class=x\n| 1\n|}\n[[Category:Birds]]"
    )
    assert corpora.strip_wiki_markup(wiki) == "Falcons are raptors of the genus.\nSee also\nA site & more"


@pytest.mark.parametrize(("name", "characters"), [("wikipedia-sample", 2_800_000), ("shakespeare", 6_000_000)])
def test_downloaded_text_is_whole_and_the_same_every_time(name, characters):
    first = online(lambda: list(corpora.documents(name)))
    assert sum(map(len, first)) > characters
    assert len(set(first)) == len(first) > 40
    assert first == list(corpora.documents(name))


def test_the_standard_library_needs_no_network(tmp_path):
    texts = list(corpora.documents("python-stdlib", tmp_path))
    assert any("def dumps(" in text for text in texts)
    assert not list(tmp_path.iterdir())


def test_offline_and_unknown_are_clear_errors(tmp_path, monkeypatch):
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path), "EXTRA_INDEX_URL": "", "RETRIES": "0"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(FalconError, match="could not download llm-falcon-model"):
        corpora.falcon_tokenizer(tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.json"))
    with pytest.raises(FalconError, match="there are: wikipedia-sample"):
        next(corpora.documents("books"))


def test_another_file_under_the_same_name_is_refused(tmp_path):
    folder = tmp_path / "archives" / "gensim-4.4.0"
    folder.mkdir(parents=True)
    (folder / "gensim.whl").write_bytes(b"not it")
    with pytest.raises(FalconError, match="does not have the SHA-256"):
        next(corpora.documents("wikipedia-sample", tmp_path))
    assert not folder.exists()
