"""What scripts/bench_order.py shows: medians, the table, the bars that are to be met, and a chart
in SVG."""

import random
import statistics

import bench_report
from bench_servers import LINK, MIB

LATENCY = 10  # ms
# key, what the start is
STARTS = {
    "plain": "the raw file, local",
    "local": "all local",
    "cor": "copy-on-read, no stream",
    "linear": "linear stream",
    "near": "stream, no history",
    "files": "stream, file-system order",
    "learned": "stream, learned order",
    "qemu": "QEMU, copy-on-read and stream",
    "nbdkit": "nbdkit, cow and readahead",
}
COLOUR = {"qemu": "#e69f00", "nbdkit": "#cc79a7", "plain": "#9aa3ad", "local": "#9aa3ad", "cor": "#56b4e9", "linear": "#56b4e9"}


def median(bench, section, source, start, figure="seconds"):
    found = bench.values.get((section, source, start), {}).get(figure)
    return statistics.median(found) if found else None


def ratio_of(bench, figure, one, other):
    """How much more `one` takes, as the median of the turns, and the interval that has 95 % of the
    medians of other draws of these turns."""
    of = [bench.values.get(("recording", "local", name), {}).get(figure, []) for name in (one, other)]
    ratios = [mine / its for mine, its in zip(*of)]
    if not ratios:
        return None
    chance = random.Random(1)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(1000))
    return statistics.median(ratios), medians[25], medians[974]


def bars_of(bench):
    """Every bar that this run has measured: (name, wanted at most, measured)."""
    found, boot_set = [], bench.requests.bytes()

    def bar(name, wanted, one, other):
        if one is not None and other:
            found.append({"name": name, "wanted": wanted, "measured": one / other, "met": one / other <= wanted})

    for kind in bench.options.sources:
        def of(start, figure="seconds", section="replay", kind=kind):
            return median(bench, section, kind, start, figure)

        linear, local = of("linear"), of("local")
        bar("%s: no history / linear stream" % kind, 0.5, of("near"), linear)
        bar("%s: file-system order / linear stream" % kind, 0.35, of("files"), linear)
        bar("%s: learned order / (all local + boot set / link)" % kind, 1.3, of("learned"), local and local + boot_set / LINK)
        # A replay takes what comes at the speed of the link, so that nearly each of its reads waits
        # a little. The guest computes meanwhile.
        bar("%s: misses in the replay, learned order / linear stream" % kind, 0.05, of("learned", "misses"), of("linear", "misses"))
        bar("%s: misses in the boot, learned order / linear stream" % kind, 0.05, of("learned", "misses", "boot"), of("linear", "misses", "boot"))
        bar("%s: fetched in the replay, learned order / boot set" % kind, 1.5, of("learned", "fetched"), boot_set)
        bar("%s: boot, learned order / local" % kind, 1.15, of("learned", section="boot"), of("local", section="boot"))
        bar("%s: fetched before the prompt, learned order / boot set" % kind, 1.5, of("learned", "fetched", "boot"), boot_set)
    for figure, wanted, name in (("touch_us", 1.01, "first touch"), ("hit_us", 1.0, "hit")):
        measured, itself = ratio_of(bench, figure, "now", "before"), ratio_of(bench, figure, "again", "before")
        if measured:
            ratio, low, high = measured
            # What the older program differs from itself, this run cannot tell.
            noise = max(itself[2] - 1, 1 - itself[1])
            limit = max(wanted, 1 + noise)
            met = False if low > limit else True if noise <= 0.01 and ratio <= limit else None
            words = "recording, %s / before (%.3f-%.3f; before / itself %.3f-%.3f)" % (name, low, high, itself[1], itself[2])
            found.append({"name": words, "wanted": wanted, "measured": ratio, "met": met})
    return found


def table(bench, bars):
    out = []
    for (section, source, start), figures in bench.values.items():
        parts = []
        for name, values in figures.items():
            scale, unit = {"seconds": (1, "s"), "reading": (1, "s"), "fetched": (MIB, "MiB"), "misses": (1, "")}.get(name, (1, "us"))
            low, mid, high = (value / scale for value in (min(values), statistics.median(values), max(values)))
            parts.append("%s %.4g %s (%.4g-%.4g)" % (name, mid, unit, low, high))
        out.append("%-9s %-5s %-30s %s" % (section, source, STARTS.get(start, start), "  ".join(parts)))
    if bars:
        out.append("\nBars (at most)")
        out += ["%-84s wanted %-6g measured %-8.3f %s" % (one["name"], one["wanted"], one["measured"], {True: "met", False: "MISSED", None: "not decided"}[one["met"]]) for one in bars]
        out.append("%d of %d bars met" % (sum(one["met"] is True for one in bars), len(bars)))
    return "\n".join(out)


def chart(bench, facts):
    """Seconds of each start as bars, one panel for each section and source."""
    text, width, left, line = bench_report.text, 760, 250, 22
    body, y = [], 30
    body.append(text(24, y, "Starts from a base behind %d ms and %d MB/s" % (LATENCY, LINK // 1_000_000), 18, weight="bold"))
    for words in facts:
        y += 18
        body.append(text(24, y, words, 12, "#6b7782"))
    groups = {}
    for (section, source, start), figures in bench.values.items():
        if "seconds" in figures:
            groups.setdefault((section, source), []).append((start, figures["seconds"]))
    for (section, source), members in groups.items():
        members.sort(key=lambda one: list(STARTS).index(one[0]))
        y += 36
        body.append(text(24, y, "%s, %s: seconds, less is better" % (section, source), 14, weight="bold"))
        y += 10
        largest = max(max(values) for _, values in members) or 1
        for start, values in members:
            low, mid, high = (value / largest * (width - left - 90) for value in (min(values), statistics.median(values), max(values)))
            middle = y + line / 2
            body.append(text(left - 8, middle + 4, STARTS[start], 12, "#3e4c59", "end"))
            body.append('<rect x="%d" y="%.1f" width="%.1f" height="14" fill="%s"/>' % (left, middle - 7, max(mid, 1), COLOUR.get(start, "#0067a5")))
            if high - low > 1:
                body.append('<path d="M%.1f %.1fH%.1f" stroke="#1f2933"/>' % (left + low, middle, left + high))
            body.append(text(left + max(mid, high) + 6, middle + 4, bench_report.number(statistics.median(values)), 12))
            y += line
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="DejaVu Sans, Helvetica, Arial, sans-serif">' % (
        width, y + 24, width, y + 24)
    return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *body, "</svg>", ""])
