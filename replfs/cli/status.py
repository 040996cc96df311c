"""The status for people: aligned lines, sizes in human units."""

from typing import Any

from replfs.errors import printable


def show(status: dict[str, Any]) -> str:
    """The lines of `replfs status`."""
    rows = [
        ("mode", status["mode"]),
        ("stage", status["stage"] + _commit(status)),
        ("error", status["error"] or "none"),
        ("last error", status["last-error"] or "none"),
        ("generation", str(status["generation"])),
        ("file", f"{status['mountpoint']}/{status['name']}"),
        ("size", size(status["size"])),
        ("disk", _file(status["disk"])),
        *(("backing", _file(file)) for file in status["backing"]),
        *([("", f"and {_count(status['more-backing'], 'more backing file')}")] if status["more-backing"] else []),
        *((name, _file(overlay)) for name, overlay in status.get("overlays", {}).items()),
        *([("listen", _listen(status))] if "listen" in status else _link(status)),
        *([("view", _listen(status["view"]))] if "view" in status else []),
        *([("QMP", _listen(status["qmp"]))] if "qmp" in status else []),
        ("durability", status["durability"]),
        *(("I/O errors", _errors(path, counts)) for path, counts in status["io-errors"].items()),
        ("state", status["state-dir"]),
        ("process", f"{status['pid']}, replfs {status['version']}"),
    ]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name + ':' if name else '':<{width}}{printable(text)}" for name, text in rows)


def _errors(path: str, counts: dict[str, int]) -> str:
    return f"{path}: {', '.join(f'{count} {kind}' for kind, count in counts.items())}"


def _listen(server: dict[str, Any]) -> str:
    if server["listen"] is None:
        return "nowhere"
    export = [f"export {server['export']!r}"] if "export" in server else []
    return ", ".join((server["listen"], *export, _count(server["connections"], "connection")))


def _link(status: dict[str, Any]) -> list[tuple[str, str]]:
    link = status["link"]
    if not link:
        return [("target", status["target"])]
    state = link["state"] + (f", again in {link['retry-in']:g} s" if "retry-in" in link else "")
    resync = link["resync"]
    if resync["paused"] and link["state"] != "paused":
        state += ", resyncs are paused"
    if resync["running"]:
        state += f", {size(resync['left'])} of {size(resync['total'])} left"
        if resync["seconds-left"] is not None:
            state += f", {size(resync['rate'])}/s, about {resync['seconds-left']:.0f} s"
    return [
        ("target", f"{status['target']}, protocol {link['protocol']}"),
        ("link", state),
        *([("link error", status["link-error"])] if status["link-error"] else []),
        ("out of sync", size(link["out-of-sync"])),
        *([("verify", _verify(link["verify"]))] if link["verify"] else []),
    ]


def _verify(verify: dict[str, Any]) -> str:
    how = f"{size(verify['done'])} of {size(verify['total'])}" if verify["running"] else verify["error"] or "done"
    return f"{how}, {size(verify['differing'])} differ"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _commit(status: dict[str, Any]) -> str:
    commit = status.get("commit")
    return f", {size(commit['done'])} of {size(commit['total'])} committed" if commit else ""


def _file(file: dict[str, Any]) -> str:
    shown = f"{file['path']}, {file['format']}, {size(file['allocated'])} allocated"
    if data := file.get("data-file"):
        shown += f", data in {data['path']}, {size(data['allocated'])} allocated"
    return f"{shown}, CORRUPT: {file['corrupt']}" if "corrupt" in file else shown


def size(count: int) -> str:
    """A number of bytes in binary units: 512 B, 1.5 KiB, 20 GiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{count} B" if unit == "B" else f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"
