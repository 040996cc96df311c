"""Every kind of qcow2 image that qemu-img makes, by name, and making one that holds a given content with QEMU's tools alone.

A kind is a history: layers, lowest first, each created with its options and then taken through its steps. The steps that write
share the content among them: each writes some of its final pieces, and noise over pieces that a later one replaces. So every
image has data, zeroes of all sorts and unallocated parts, snapshots differ from the active disk, and a backing file shows through
in some places and is covered in others. The last step that writes completes the content.
"""

import itertools
import json
import random
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "disk.qcow2"


@dataclass(frozen=True)
class Layer:
    """One image of a chain.

    ``steps``: ``convert [-c]``: all by qemu-img convert, first of all; ``write [-z|-zu|-s]``: pieces by qemu-io, those of zeroes
    the way that is named (else by any); ``compress``: whole clusters anew as compressed ones; ``snapshot NAME``, ``restore NAME``,
    ``delete NAME``; ``bitmap NAME`` and any other qemu-img bitmap operation, ``bitmap --disable NAME``; ``amend OPTIONS``;
    ``resize``, to the disk's size; ``commit``, into the layer below; ``vmstate``, data behind the disk's end as of a saved machine.
    """

    options: str = ""  # of qemu-img create; DATA stands for the path of an external data file
    steps: tuple[str, ...] = ("write", "write")
    format: str = "qcow2"
    size: tuple[float, int] = (1, 0)  # when created: so many times the disk's size, and bytes more

    def option(self, name: str, default: str) -> str:
        return dict(part.split("=", 1) for part in self.options.split(",") if part).get(name, default)


@dataclass(frozen=True)
class Kind:
    layers: tuple[Layer, ...]
    elsewhere: bool = False  # backing and data files are in another folder, named by an absolute path

    @property
    def top(self) -> Layer:
        return self.layers[-1]

    @property
    def cluster(self) -> int:
        number = self.top.option("cluster_size", "64k")
        return int(number.rstrip("kM")) * {"k": 1 << 10, "M": 1 << 20}.get(number[-1], 1)

    @property
    def subcluster(self) -> int:
        """The unit that data and zeroes come in."""
        return self.cluster // 32 if self.top.option("extended_l2", "off") == "on" else self.cluster

    @property
    def below_size(self) -> int:
        """Of the backing file, as far as the disk goes; 0 if there is none."""
        if len(self.layers) == 1:
            return 0
        factor, more = self.layers[-2].size
        return min(int(self.size * factor) + more, self.size)

    @property
    def version_2(self) -> bool:
        amended = [step.split("=")[1] for step in self.top.steps if step.startswith("amend compat=")]
        return (amended or [self.top.option("compat", "1.1")])[-1] == "0.10"

    @property
    def data_file(self) -> str | None:
        """The external data file's path, from the image's folder."""
        name = self.top.option("data_file", "")
        return name.replace("DATA", "disk.data") or None

    @property
    def snapshots(self) -> list[str]:
        steps = [step.split() for step in self.top.steps]
        deleted = {step[1] for step in steps if step[0] == "delete"}
        return [step[1] for step in steps if step[0] == "snapshot" and step[1] not in deleted]

    @property
    def size(self) -> int:
        """Enough for what is telling: several L2 tables if clusters are small, and an end inside a cluster."""
        clusters = {512: 211, 1024: 300, 2048: 300, 4096: 530, 16384: 37, 65536: 28, 1 << 20: 4, 2 << 20: 3}[self.cluster]
        return clusters * self.cluster + (self.cluster // 2 if self.cluster > 512 else 0) + (512 if self.cluster > 1024 else 0)


def image(options: str = "", *steps: str, elsewhere: bool = False) -> Kind:
    return Kind((Layer(options, steps or ("write", "write")),), elsewhere)


def chain(*layers: Layer, elsewhere: bool = False) -> Kind:
    return Kind(layers, elsewhere)


RAW = Layer(format="raw", steps=("write",))
QCOW2 = Layer(steps=("write",))
COMPRESSED = Layer(steps=("convert -c",))
PAIR = ("write", "snapshot one", "write", "snapshot two", "write")

KINDS: dict[str, Kind] = {
    # versions and sizes of clusters
    "plain": image(),
    "converted": image("", "convert"),
    "written_once": image("", "write"),
    "v2": image("compat=0.10"),
    "v2_512": image("compat=0.10,cluster_size=512"),
    "v2_2m": image("compat=0.10,cluster_size=2M"),
    "512": image("cluster_size=512"),
    "1k": image("cluster_size=1k"),
    "2k": image("cluster_size=2k"),
    "4k": image("cluster_size=4k"),
    "1m": image("cluster_size=1M"),
    "2m": image("cluster_size=2M"),
    # widths of refcounts
    "refcount_1": image("refcount_bits=1"),
    "refcount_2": image("refcount_bits=2,cluster_size=1k"),
    "refcount_4": image("refcount_bits=4"),
    "refcount_8": image("refcount_bits=8,cluster_size=4k"),
    "refcount_32": image("refcount_bits=32"),
    "refcount_64": image("refcount_bits=64"),
    "512_refcount_1": image("refcount_bits=1,cluster_size=512"),
    "512_refcount_64": image("refcount_bits=64,cluster_size=512"),
    "2m_refcount_64": image("refcount_bits=64,cluster_size=2M"),
    # extended L2 entries
    "extended_16k": image("extended_l2=on,cluster_size=16k"),
    "extended_64k": image("extended_l2=on"),
    "extended_2m": image("extended_l2=on,cluster_size=2M"),
    "extended_refcount_1": image("extended_l2=on,refcount_bits=1"),
    # compressed clusters
    "zlib": image("", "convert -c"),
    "zlib_v2": image("compat=0.10", "convert -c", "write"),
    "zlib_512": image("cluster_size=512", "convert -c", "write"),
    "zlib_1k": image("cluster_size=1k", "convert -c", "write"),
    "zlib_4k": image("cluster_size=4k", "convert -c", "write"),
    "zlib_2m": image("cluster_size=2M", "convert -c"),
    "zlib_refcount_1": image("refcount_bits=1,cluster_size=4k", "convert -c", "write"),
    "zlib_refcount_2": image("refcount_bits=2", "convert -c", "write"),
    "zlib_512_refcount_64": image("cluster_size=512,refcount_bits=64", "convert -c", "write"),
    "zlib_again": image("cluster_size=4k", "convert -c", "write", "compress", "write", "compress"),
    "zlib_extended": image("extended_l2=on", "convert -c", "write"),
    "zlib_extended_16k": image("extended_l2=on,cluster_size=16k", "convert -c", "write", "compress"),
    "zlib_extended_2m": image("extended_l2=on,cluster_size=2M", "convert -c"),
    "zstd": image("compression_type=zstd", "convert -c", "write"),
    "zstd_512": image("compression_type=zstd,cluster_size=512", "convert -c", "write"),
    "zstd_4k": image("compression_type=zstd,cluster_size=4k", "convert -c", "write", "compress"),
    "zstd_2m": image("compression_type=zstd,cluster_size=2M", "convert -c"),
    "zstd_extended": image("compression_type=zstd,extended_l2=on,cluster_size=16k", "convert -c", "write"),
    # preallocation
    "metadata": image("preallocation=metadata"),
    "metadata_512": image("preallocation=metadata,cluster_size=512"),
    "metadata_extended": image("preallocation=metadata,extended_l2=on"),
    "falloc": image("preallocation=falloc"),
    "falloc_v2_4k": image("preallocation=falloc,compat=0.10,cluster_size=4k"),
    "full": image("preallocation=full"),
    "full_extended_16k": image("preallocation=full,extended_l2=on,cluster_size=16k"),
    # zero clusters
    "zeroes_plain": image("cluster_size=4k", "write", "write", "write -zu"),
    "zeroes_allocated": image("cluster_size=4k", "write", "write", "write -z"),
    "zeroes_extended": image("extended_l2=on", "write", "write", "write -zu", "write -z"),
    "zeroes_v2": image("compat=0.10", "write", "write", "write -zu", "write -z"),
    "zeroes_written": image("", "write", "write -s"),
    # backing files
    "backed_raw": chain(RAW, Layer()),
    "backed_qcow2": chain(QCOW2, Layer()),
    "backed_v2": chain(RAW, Layer("compat=0.10")),
    "backed_v2_512": chain(QCOW2, Layer("compat=0.10,cluster_size=512")),
    "backed_512": chain(RAW, Layer("cluster_size=512")),
    "backed_2m": chain(RAW, Layer("cluster_size=2M")),
    "backed_extended": chain(RAW, Layer("extended_l2=on")),
    "backed_extended_2m": chain(QCOW2, Layer("extended_l2=on,cluster_size=2M")),
    "backed_extended_metadata": chain(RAW, Layer("extended_l2=on,preallocation=metadata")),
    "backed_shorter": chain(Layer(format="raw", steps=("write",), size=(0.6, 0)), Layer()),
    "backed_shorter_qcow2": chain(Layer("cluster_size=4k", ("write",), size=(0.6, 0)), Layer("compat=0.10")),
    "backed_shorter_extended": chain(Layer(format="raw", steps=("write",), size=(0.6, 777)), Layer("extended_l2=on")),
    "backed_longer": chain(Layer(format="raw", steps=("write",), size=(1.4, 0)), Layer()),
    "backed_longer_qcow2": chain(Layer(steps=("write",), size=(1.4, 0)), Layer("cluster_size=1k")),
    "backed_unaligned": chain(Layer(format="raw", steps=("write",), size=(1, -333)), Layer()),
    "backed_unaligned_v2": chain(Layer(format="raw", steps=("write",), size=(0.7, 1)), Layer("compat=0.10,cluster_size=4k")),
    "backed_elsewhere": chain(QCOW2, Layer(), elsewhere=True),
    "backed_compressed": chain(COMPRESSED, Layer()),
    "backed_compressed_zstd_512": chain(Layer("compression_type=zstd,cluster_size=512", ("convert -c",)), Layer("extended_l2=on")),
    "compressed_over_raw": chain(RAW, Layer("", ("compress", "write", "compress"))),
    "chain_of_5": chain(
        RAW,
        Layer("compat=0.10,cluster_size=512", ("write",)),
        Layer("extended_l2=on", ("write", "snapshot below", "write")),
        Layer("compression_type=zstd,cluster_size=4k", ("compress",), size=(0.8, 0)),
        Layer("cluster_size=2k,refcount_bits=8", ("write",)),
    ),
    "chain_of_5_extended": chain(
        RAW,
        Layer("", ("compress",), size=(1.2, 0)),
        Layer("cluster_size=2M", ("write",), size=(0.5, 0)),
        Layer("compat=0.10,cluster_size=1k", ("write",)),
        Layer("extended_l2=on,cluster_size=16k", ("write",)),
    ),
    "backed_data_file": chain(Layer("data_file=DATA", ("write",)), Layer("extended_l2=on")),
    "backed_data_file_raw": chain(Layer("data_file=DATA,data_file_raw=on,cluster_size=4k", ("write",)), Layer("cluster_size=1k")),
    "backed_snapshots": chain(Layer("cluster_size=4k", PAIR), Layer()),
    "committed": chain(QCOW2, Layer("", ("write", "commit", "write"))),
    "committed_v2": chain(QCOW2, Layer("compat=0.10,cluster_size=512", ("write", "commit", "write"))),
    # internal snapshots
    "snapshots": image("", *PAIR),
    "snapshots_v2": image("compat=0.10", *PAIR),
    "snapshots_v2_512": image("compat=0.10,cluster_size=512", *PAIR),
    "snapshots_512_refcount_64": image("cluster_size=512,refcount_bits=64", *PAIR),
    "snapshots_2m": image("cluster_size=2M", *PAIR),
    "snapshots_refcount_2": image("refcount_bits=2", *PAIR),
    "snapshots_refcount_4": image("refcount_bits=4,cluster_size=4k", *PAIR, "snapshot three", "snapshot four", "write"),
    "snapshot_refcount_1_of_nothing": image("refcount_bits=1", "snapshot one", "write"),
    "snapshots_extended": image("extended_l2=on", *PAIR),
    "snapshots_compressed": image("cluster_size=4k", "convert -c", "snapshot one", "write", "snapshot two", "write"),
    "snapshots_compressed_extended": image("extended_l2=on,compression_type=zstd", "convert -c", *PAIR),
    "snapshots_compressed_refcount_4": image("refcount_bits=4", "convert -c", *PAIR),
    "snapshots_backed": chain(RAW, Layer("", PAIR)),
    "snapshots_backed_v2": chain(QCOW2, Layer("compat=0.10,cluster_size=4k", PAIR)),
    "snapshots_backed_extended": chain(QCOW2, Layer("extended_l2=on,cluster_size=16k", PAIR)),
    "snapshot_untouched": image("", "write", "write", "snapshot one"),
    "snapshot_of_metadata": image("preallocation=metadata,cluster_size=4k", "snapshot one", "write", "snapshot two", "write"),
    "snapshot_deleted": image("", *PAIR, "delete one"),
    "snapshots_deleted_512": image("cluster_size=512", *PAIR, "delete one", "snapshot three", "write", "delete two"),
    "snapshot_restored": image("cluster_size=4k", *PAIR, "restore one", "write"),
    "snapshot_of_a_machine": image("cluster_size=4k", "write", "vmstate", "snapshot one", "write"),
    "snapshot_of_a_machine_512": image("cluster_size=512,refcount_bits=32", "vmstate", "write", "snapshot one", "write"),
    # external data files
    "data_file": image("data_file=DATA"),
    "data_file_512": image("data_file=DATA,cluster_size=512"),
    "data_file_extended": image("data_file=DATA,extended_l2=on"),
    "data_file_backed": chain(RAW, Layer("data_file=DATA")),
    "data_file_elsewhere": image("data_file=DATA", elsewhere=True),
    "data_file_raw": image("data_file=DATA,data_file_raw=on"),
    "data_file_raw_512": image("data_file=DATA,data_file_raw=on,cluster_size=512,lazy_refcounts=on"),
    "data_file_raw_2m": image("data_file=DATA,data_file_raw=on,cluster_size=2M"),
    "data_file_raw_extended": image("data_file=DATA,data_file_raw=on,extended_l2=on"),
    "data_file_raw_full": image("data_file=DATA,data_file_raw=on,preallocation=full"),
    # what else an image goes through
    "lazy": image("lazy_refcounts=on"),
    "lazy_snapshots": image("lazy_refcounts=on,cluster_size=1k", *PAIR),
    "bitmap": image("", "write", "bitmap --add one", "write"),
    "bitmaps_512": image("cluster_size=512", "bitmap --add -g 512 one", "write", "bitmap --add two", "write"),
    "bitmaps_snapshots": image("", "bitmap --add one", "bitmap --disable one", *PAIR, "bitmap --add -g 4k two", "write"),
    "bitmap_backed_extended": chain(RAW, Layer("extended_l2=on", ("bitmap --add one", "write", "write"))),
    "bitmap_data_file": image("data_file=DATA,data_file_raw=on", "bitmap --add one", "write", "write"),
    "upgraded": image("compat=0.10", "write", "amend compat=1.1", "write"),
    "downgraded": image("cluster_size=4k", "write", "write -zu", "write -z", "amend compat=0.10", "write"),
    "refcounts_widened": image("cluster_size=512", "write", "snapshot one", "amend refcount_bits=64", "write"),
    "grown": Kind((Layer("cluster_size=512", ("write", "resize", "write"), size=(0.1, 0)),)),
    "grown_snapshots": Kind((Layer("cluster_size=1k", ("write", "snapshot one", "resize", *PAIR[2:]), size=(0.3, 0)),)),
    "grown_over_a_longer_file": chain(RAW, Layer("", ("write", "resize", "write"), size=(0.4, 0))),
    "shrunk": Kind((Layer("cluster_size=512", ("write", "resize", "write"), size=(1.9, 0)),)),
    "shrunk_extended": Kind((Layer("extended_l2=on,cluster_size=16k", ("write", "resize", "write"), size=(1.9, 0)),)),
}


def qemu(folder: Path, *command: str) -> str:
    """Run qemu-img or qemu-io there; a relative name of a data file counts from the working directory."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, cwd=folder
    )
    assert done.returncode == 0, f"{shlex.join(command)[:2000]}: {done.stdout}"
    return done.stdout


def qemu_io(folder: Path, *arguments: str) -> None:
    """Without waiting for the host's disk."""
    qemu(folder, "qemu-io", "-t", "unsafe", *arguments)


def info(disk: Path) -> dict[str, Any]:
    """What qemu-img tells of an image, but its warnings."""
    printed = qemu(disk.parent, "qemu-img", "info", "--output=json", disk.name)
    found: dict[str, Any] = json.loads(printed[printed.index("{") :])
    return found


def open_options(name: str, disk: Path) -> dict[str, list[Path]]:
    """What ``open_disk`` is to be told for an image of this kind."""
    if not KINDS[name].elsewhere:
        return {}
    found = info(disk)
    below = found.get("backing-filename") or found["format-specific"]["data"]["data-file"]
    return {"allow_backing": [Path(below).parent]}


def filling(name: str, size: int) -> bytes:
    """Data that compresses, data that does not, and zeroes, in runs that mostly end anywhere."""
    random_ = random.Random(f"filling {name}")
    content = bytearray(size)
    for start, end in _pieces(size, KINDS[name].cluster, random_):
        how = random_.randrange(7)
        if how < 2:
            content[start:end] = random_.randbytes(end - start)
        elif how < 4:
            line = b"%d: %s\n" % (start, name.encode())
            content[start:end] = (line * ((end - start) // len(line) + 1))[: end - start]
    return bytes(content)


def make(name: str, folder: Path, size: int, content: bytes | None = None) -> Path:
    """An image of this kind in an empty folder, of ``size`` bytes and with this content (None: its filling)."""
    kind = KINDS[name]
    maker = _Maker(kind, folder, filling(name, size) if content is None else content)
    for depth, layer in enumerate(kind.layers):
        maker.create(layer, depth)
        for step in layer.steps:
            maker.step(step)
    assert maker.state == maker.content
    return folder / NAME


def _pieces(size: int, cluster: int, random_: random.Random) -> Iterator[tuple[int, int]]:
    cuts = {0, size}
    for _ in range(min(14, size // cluster)):
        cuts.add(random_.randrange(0, size, cluster))
        cuts.add(random_.randrange(0, size, cluster))
        cuts.add(random_.randrange(size))
    ordered = sorted(cuts)
    yield from itertools.pairwise(ordered)


class _Maker:
    def __init__(self, kind: Kind, folder: Path, content: bytes) -> None:
        self.kind = kind
        self.folder = folder
        self.content = content
        self.random = random.Random(f"making {len(content)} {kind}")
        self.pieces = list(_pieces(len(content), kind.cluster, self.random))
        steps = [step.split()[0] for layer in kind.layers for step in layer.steps]
        self.rounds = sum(step in ("write", "convert", "compress") for step in steps)
        self.owners = [self.random.randrange(self.rounds) for _ in self.pieces]
        self.round = 0
        self.state = bytearray()
        self.saved: dict[str, bytes] = {}

    def create(self, layer: Layer, depth: int) -> None:
        self.layer = layer
        top = layer is self.kind.top
        size = int(len(self.content) * layer.size[0]) + layer.size[1]
        if layer.format == "qcow2":
            size = -(-size // 512) * 512
        lower = self.folder
        if self.kind.elsewhere:
            lower = self.folder.parent / f"{self.folder.name}.elsewhere"
            lower.mkdir(exist_ok=True)
        self.path = str(self.folder / NAME if top else lower / f"below{depth}")
        command = ["qemu-img", "create", "-q", "-f", layer.format]
        if depth:
            below = (lower / f"below{depth - 1}") if self.kind.elsewhere else f"below{depth - 1}"
            command += ["-b", str(below), "-F", self.kind.layers[depth - 1].format]
        if layer.options:
            data = str(lower / "disk.data") if self.kind.elsewhere else "disk.data"
            command += ["-o", layer.options.replace("DATA", data)]
        qemu(self.folder, *command, self.path, str(size))
        self._set_size(size)

    def _set_size(self, size: int) -> None:
        self.state = self.state[:size].ljust(size, b"\0")

    def step(self, step: str) -> None:
        verb, *arguments = step.split()
        if verb in ("write", "convert", "compress"):
            getattr(self, f"_{verb}")(*arguments)
            self.round += 1
        elif verb == "snapshot":
            qemu(self.folder, "qemu-img", "snapshot", "-c", *arguments, self.path)
            self.saved[arguments[0]] = bytes(self.state)
        elif verb == "restore":
            qemu(self.folder, "qemu-img", "snapshot", "-a", *arguments, self.path)
            self.state = bytearray(self.saved[arguments[0]])
        elif verb == "delete":
            qemu(self.folder, "qemu-img", "snapshot", "-d", *arguments, self.path)
        elif verb == "bitmap":
            *options, name = arguments
            qemu(self.folder, "qemu-img", "bitmap", "-f", "qcow2", *options, self.path, name)
        elif verb == "amend":
            qemu(self.folder, "qemu-img", "amend", "-q", "-f", "qcow2", "-o", *arguments, self.path)
        elif verb == "resize":
            qemu(self.folder, "qemu-img", "resize", "-q", "-f", "qcow2", "--shrink", self.path, str(len(self.content)))
            self._set_size(len(self.content))
        elif verb == "commit":
            qemu(self.folder, "qemu-img", "commit", "-q", "-f", "qcow2", self.path)
        else:
            assert step == "vmstate"
            self._io([f"write -q -b -P 7 {4 * self.kind.cluster} {self.kind.cluster * 100}", "write -q -b -P 8 512 512"])

    def _changes(self) -> list[tuple[int, bytes]]:
        """What this round writes: where, and what."""
        last = self.round == self.rounds - 1
        changes: list[tuple[int, bytes]] = []
        for (start, end), owner in zip(self.pieces, self.owners, strict=True):
            now, final = self.state[start:end], self.content[start:end]
            data = final[: len(now)]  # this layer's disk may end before
            if owner > self.round and not last:
                if self.random.random() < 0.4:
                    continue
                how = self.random.randrange(3)
                data = [bytes(len(data)), self.random.randbytes(len(data)), b"old\n" * (len(data) // 4 + 1)][how][: len(data)]
            elif (owner < self.round or last) and now == final:
                continue
            if any(data) or any(now) or (data and self.random.random() < 0.5):
                changes.append((start, data))
        if len(self.state) > len(self.content):
            changes.append((len(self.content) + 13, b"behind the end of the disk\n" * 300))
            changes[-1] = (changes[-1][0], changes[-1][1][: len(self.state) - changes[-1][0]])
        for start, data in changes:
            self.state[start : start + len(data)] = data
        return changes

    def _convert(self, *options: str) -> None:
        self._changes()
        source = self.folder / "source"
        source.write_bytes(self.state)
        # -S 512: zeroes inside of data are left out as well where the image has a unit for them
        fixed = ("-n", "--target-is-zero", "-S", "512", "-f", "raw", "-O", "qcow2")
        qemu(self.folder, "qemu-img", "convert", *options, *fixed, "source", self.path)
        source.unlink()

    def _write(self, how: str | None = None) -> None:
        commands = []
        for number, (start, data) in enumerate(self._changes()):
            way = (how or self.random.choice(["-z", "-zu", "-s"])) if not any(data) else "-s"
            if way == "-s":
                (self.folder / f"piece{number}").write_bytes(data)
                way = f"-s piece{number}"
            commands.append(f"write -q {way.replace('-zu', '-z -u')} {start} {len(data)}")
        self._io(commands)

    def _compress(self) -> None:
        """QEMU compresses whole clusters, and only into clusters that hold nothing."""
        commands = []
        cluster = int(Kind((self.layer,)).cluster)
        end = 0
        for number, (first, data) in enumerate(self._changes()):
            start = max(first // cluster * cluster, end)
            end = max(end, min(-(-(first + len(data)) // cluster) * cluster, len(self.state)))
            if start < end:
                (self.folder / f"piece{number}").write_bytes(self.state[start:end])
                commands += [f"discard -q {start} {end - start}", f"write -q -c -s piece{number} {start} {end - start}"]
        self._io(commands)

    def _io(self, commands: list[str]) -> None:
        if commands:
            options = [word for command in commands for word in ("-c", command)]
            qemu_io(self.folder, "-f", self.layer.format, *options, self.path)
        for piece in self.folder.glob("piece*"):
            piece.unlink()
