"""`examples/emo_tiny/corpus.py`: packages fetched, and the texts read out of them."""

import gzip
import io
import re
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import pytest
from corpus_parts import clean, extract, fetch

# Reading packages


def read(reader, folder):
    return dict(reader(folder, Path("mandoc")))


def test_source_files_are_read_but_those_left_out(tmp_path):
    for name in ("a.py", "tests/b.py", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "d.py").write_bytes(b"\xff\xfe")
    (tmp_path / "e.py").symlink_to("a.py")
    assert read(extract.code("**/*.py", skip="/tests/"), tmp_path) == {"a.py": "text of a.py"}


def test_members_of_a_tar_file_are_read(tmp_path):
    with tarfile.open(tmp_path / "x.tar.xz", "w:xz") as archive:
        for name in ("x/mm/a.c", "x/drivers/b.c"):
            data = name.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert read(extract.tarball("*.tar.xz", r"/mm/.*\.c$"), tmp_path) == {"x/mm/a.c": "x/mm/a.c"}


def test_pages_lose_navigation_and_keep_preformatted_text(tmp_path):
    (tmp_path / "a.html").write_text(
        "<html><head><title>no</title></head><body><div class='navheader'>no<p>no</p></div><h1>Title</h1>"
        "<p>One\n  <em>two</em>&amp;three<br>four</p><ul><li>item</li></ul><pre>a\n    b</pre></body></html>"
    )
    text = read(extract.html("*.html"), tmp_path)["a.html"]
    assert re.sub(r"\n{2,}", "\n\n", text).strip() == "Title\n\nOne two&three\nfour\n\n- item\n\na\n    b"


def test_only_the_root_element_of_a_page_is_read(tmp_path):
    (tmp_path / "a.html").write_text("<body><p>no</p><div id='Main'><p>yes</p></div><p>no</p></body>")
    assert read(extract.html("*.html", "Main"), tmp_path)["a.html"].strip() == "yes"


def test_manual_pages_lose_overstrikes_heads_and_credits():
    sections = "N\x08NO\x08OM\x08M\n       ls - liste\n\nAUTEUR\n       Quelqu'un\n\nVOIR AUSSI\n       cat\n"
    rendered = f"LS(1)   User   LS(1)\n\n{sections}\nLS(1)"
    assert extract._plain_manual(rendered) == "\nNOM\n  ls - liste\n\nVOIR AUSSI\n  cat\n"


def test_manual_pages_are_rendered_but_those_that_name_another(tmp_path):
    mandoc = tmp_path / "mandoc"
    mandoc.write_text("#!/bin/sh\necho head; cat; echo foot")
    mandoc.chmod(0o755)
    folder = tmp_path / "usr" / "share" / "man" / "man1"
    folder.mkdir(parents=True)
    (folder / "a.1.gz").write_bytes(gzip.compress(b"NAME\n       a\n"))
    (folder / "b.1.gz").write_bytes(gzip.compress(b".so man1/a.1\n"))
    assert dict(extract.manual_pages()(tmp_path, mandoc)) == {
        "usr/share/man/man1/a.1.gz": "NAME\n  a",
        "usr/share/man/man1/b.1.gz": "",
    }


@pytest.mark.slow
def test_a_real_package_is_fetched_once_and_read(tmp_path):
    # The one test that fetches real packages: only a Debian that knows its archive has them. The others make
    # their own, so that nothing else of the corpus goes untested elsewhere.
    if not (shutil.which("apt-cache") and fetch._debian_record("manpages-es")):
        pytest.skip("no Debian, or no package lists: run `apt-get update`")
    packages = [fetch.fetch(f"debian:{name}", tmp_path) for name in ("mandoc", "no-such-name | manpages-es")]
    assert packages[1].sha256 == fetch.sha256(tmp_path / "debian" / packages[1].file)
    pages = dict(extract.manual_pages()(packages[1].folder, packages[0].folder / "usr/bin/mandoc"))
    texts = [clean.clean(page, language="spanish") for page in pages.values()]
    assert sum(text is not None for text in texts) > 100
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert fetch.fetch("debian:manpages-es", tmp_path) == packages[1]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_proofs_of_metamath_go(tmp_path):
    heading = "$(\n" + "#" * 40 + "\n  Logic\n" + "#" * 40 + "\n$)\n"
    theorem = (
        "  $( A law.  (Contributed by NM, 1-Jan-1990.) $)\n  id $p |- ( ph -> ph ) $= ( wi ax-1 ) AABC $."
    )
    (tmp_path / "set.mm").write_text("intro\n" + heading + theorem)
    assert read(extract.metamath("*.mm"), tmp_path)["set.mm#1"] == (
        "  Logic\n  $( A law. $)\n  id $p |- ( ph -> ph ) $."
    )


def test_a_dictionary_is_read_by_page(tmp_path):
    entries = [f"Word{n} \\Word{n}\\, n.\n   A meaning of it.\n   [1913 Webster]" for n in range(500)]
    (tmp_path / "d.dict.dz").write_bytes(gzip.compress("\n\n".join(entries).encode()))
    pages = list(read(extract.dictionary("*.dz"), tmp_path).values())
    assert len(pages) > 2 and "Webster" not in "".join(pages)
    assert "\n\n".join(pages).count("A meaning") == 500


def test_scripture_is_read_by_chapter(tmp_path):
    book = (
        '<div osisID="Gen" type="book"/><title>Genesis</title><chapter osisID="Gen.1" sID="Gen.1"/>'
        '<w lemma="x">In</w> the <note>or: at</note>beginning.<div sID="p"/> <l sID="1"/>A line<l eID="1"/>'
        '<chapter eID="Gen.1"/><chapter osisID="Gen.2" sID="Gen.2"/>Second &amp; last'
    )
    for testament, text in (("ot", book), ("nt", "")):
        data = zlib.compress(text.encode())
        (tmp_path / "m").mkdir(exist_ok=True)
        (tmp_path / "m" / f"{testament}.bzz").write_bytes(data)
        (tmp_path / "m" / f"{testament}.bzs").write_bytes(struct.pack("<III", 0, len(data), len(text)))
    assert read(extract.sword("m"), tmp_path) == {
        "m#ot0.Gen.1": "In the beginning.\n\nA line",
        "m#ot0.Gen.2": "Second & last",
    }


# Fetching


def test_an_unknown_debian_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_debian_record", lambda name: None)
    with pytest.raises(ValueError, match="'no-such' or 'nor-this' is not in .*apt-get update"):
        fetch.fetch("debian:no-such | nor-this", tmp_path)


def test_a_machine_without_apt_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="'manpages' cannot be fetched.*apt-cache.*--dataset"):
        fetch.fetch("debian:manpages", tmp_path)


def test_a_broken_download_is_not_taken(tmp_path, monkeypatch):
    record = {
        "Package": "p",
        "Version": "1:2",
        "Architecture": "all",
        "SHA256": "0" * 64,
        "Filename": "p.deb",
    }
    monkeypatch.setattr(fetch, "_debian_record", lambda name: record)
    monkeypatch.setattr(
        fetch, "_run", lambda command, problem, cwd=None: (cwd / "p_1%3a2_all.deb").write_bytes(b"half")
    )
    with pytest.raises(ValueError, match="'p' 1:2 could not be downloaded.*checksum"):
        fetch.fetch("debian:p", tmp_path)


@pytest.mark.parametrize("specification", ["pypi:sympy", "npm:left-pad"])
def test_a_package_that_is_not_named_rightly_is_refused(tmp_path, specification):
    with pytest.raises(ValueError, match="needs an exact version|Unknown kind of package 'npm'"):
        fetch.fetch(specification, tmp_path)


def test_an_interrupted_unpacking_is_begun_again(tmp_path):
    def fails(folder):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch._unpack_once(tmp_path / "p", fails)
    assert not (tmp_path / "p").exists()
    folder = fetch._unpack_once(tmp_path / "p", lambda folder: (folder / "whole").write_text(""))
    assert [path.name for path in folder.iterdir()] == ["whole"]
