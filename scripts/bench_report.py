"""What scripts/bench.py shows: medians, the table, the bars that are to be met, JSON and a chart in SVG."""

import html
import statistics

QEMU = ("qemu-threads", "qemu-uring")
COLUMNS = (  # key, heading, colour in the chart
    ("plain", "plain file", "#9aa3ad"),
    ("cp", "cp", "#9aa3ad"),
    ("ceiling-dev", "ceiling dev", "#c9ced4"),
    ("ceiling-uring", "ceiling uring", "#aab2bb"),
    ("convert", "img convert", "#c9ced4"),
    ("nbdkit", "nbdkit cow", "#cc79a7"),
    ("qemu", "QEMU", "#e69f00"),
    ("cordisk-dev", "cordisk dev", "#56b4e9"),
    ("cordisk-uring", "cordisk uring", "#0067a5"),
)
HEADING = {key: heading for key, heading, _ in COLUMNS}
COLOUR = {key: colour for key, _, colour in COLUMNS}

# The ceiling is that of the own transport. Row, peer, and the required ratio to the peer over
# /dev/fuse and over io_uring. For a time, 2.0 means half of it. Against "idle" the peer is cordisk
# after the stream: 0.67 means 1.5 times its time.
BARS = (
    ("read4k-d1", "qemu", 2.0, 3.0),
    ("read4k-d1", "ceiling", 0.9, 0.9),
    ("read4k-d32", "qemu", 1.5, 1.5),
    ("read4k-d32", "ceiling", 0.9, 0.9),
    ("read4k-j4", "qemu", 2.0, 2.0),
    ("read4k-j4", "ceiling", 0.9, 0.9),
    ("read1m", "qemu", 3.5, 3.5),
    ("read1m", "ceiling", 0.85, 0.85),
    ("write4k-d1", "qemu", 1.6, 2.5),
    ("write4k-d1", "ceiling", 0.9, 0.9),
    ("write4k-d32", "qemu", 2.5, 2.5),
    ("write4k-d32", "ceiling", 0.9, 0.9),
    ("write1m", "qemu", 1.0, 1.0),
    ("write1m", "ceiling", 0.85, 0.85),
    ("touch-raw-seq", "qemu", 3.0, 3.0),
    ("touch-raw-rand", "qemu", 2.0, 2.0),
    ("touch-zlib-seq", "qemu", 1.5, 1.5),
    ("touch-zlib-rand", "qemu", 1.5, 1.5),
    ("firstread-sub4k", "qemu", 2.5, 2.5),
    ("firstread-sub2k", "qemu", 2.5, 2.5),
    ("stream-raw", "qemu", 2.5, 2.5),
    ("stream-raw-synced", "qemu", 2.5, 2.5),
    ("stream-raw", "cp", 1.0, 1.0),
    ("stream-raw-synced", "cp", 1.0, 1.0),
    ("stream-zlib", "qemu", 1.5, 1.5),
    ("stream-reflink", "qemu", 20.0, 20.0),
    ("during-read-p99", "qemu", 2.0, 2.0),
    ("during-fsync-p99", "qemu", 2.0, 2.0),
    ("during-read-p99.9", "qemu", 1.0, 1.0),
    ("during-fsync-p99.9", "qemu", 1.0, 1.0),
    ("during-read-p99.9", "idle", 0.67, 0.67),
    ("during-fsync-p99.9", "idle", 0.67, 0.67),
    ("big-rss", "qemu", 1.0, 1.0),
)


class Line:
    """A row of the table with its statistics: for each column (median, minimum, maximum), QEMU being the better of its two ways."""

    def __init__(self, key, row):
        self.key, self.row, self.cells, self.best_qemu = key, row, {}, ""
        for target, values in row.values.items():
            cell = (statistics.median(values), min(values), max(values))
            if target in QEMU:
                if "qemu" in self.cells and not self.is_better(cell[0], self.cells["qemu"][0]):
                    continue
                self.best_qemu, target = target, "qemu"
            self.cells[target] = cell

    def is_better(self, one, other):
        return one > other if self.row.better == "high" else one < other

    def ratio(self, target, other):
        """How many times as good: above 1, `target` is better, whatever the unit. None if either was not measured."""
        if other == "ceiling":
            other = target.replace("cordisk", "ceiling")
        if target not in self.cells or other not in self.cells:
            return None
        one, two = self.cells[target][0], self.cells[other][0]
        up, down = (one, two) if self.row.better == "high" else (two, one)
        return up / down if down else None


def lines_of(rows):
    return [Line(key, row) for key, row in rows.items() if row.values]


def bars_of(lines):
    """Every bar that this run has measured: (line, against, transport, wanted, measured)."""
    by_key, found = {line.key: line for line in lines}, []
    for key, other, dev, uring in BARS:
        for transport, wanted in (("dev", dev), ("uring", uring)):
            measured = measured_of(by_key, key, "cordisk-" + transport, other)
            if measured is not None:
                found.append((by_key[key], other, transport, wanted, measured))
    return found


def measured_of(by_key, key, target, other):
    """How many times as good as the peer the target is in this row; None if either was not measured."""
    line, idle = by_key.get(key), by_key.get(key.replace("during-", "idle-"))
    if line is None:
        return None
    if other != "idle":
        return line.ratio(target, other)
    if idle is None or target not in line.cells or target not in idle.cells:
        return None
    return idle.cells[target][0] / line.cells[target][0]


def number(value):
    """Three or four significant digits, thousands and millions written short."""
    for limit, divisor, suffix in ((1e7, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= limit:
            return "%.*f%s" % (0 if value >= 100 * divisor else 1, value / divisor, suffix)
    if value >= 100 or value == 0:
        return "%.0f" % value
    return "%.*f" % (1 if value >= 10 else 2 if value >= 0.1 else 3, value)


def span(cell):
    low, high = number(cell[1]), number(cell[2])
    return low + "-" + high


def columns_of(lines):
    used = {target for line in lines for target in line.cells}
    return [key for key, _, _ in COLUMNS if key in used]


def sections_of(lines):
    found = {}
    for line in lines:
        found.setdefault(line.row.section, []).append(line)
    return found


def ratios(line, other):
    """ "2.1 / 3.2": over /dev/fuse / over io_uring."""
    found = [line.ratio("cordisk-" + transport, other) for transport in ("dev", "uring")]
    return " / ".join("%.2f" % one for one in found if one is not None)


def table(lines, style):
    """The table as text: medians, below each its smallest and largest value, and the ratios."""
    out = []
    for section, members in sections_of(lines).items():
        columns = columns_of(members)
        against = [(other, "x " + heading) for other, heading in (("qemu", "QEMU"), ("ceiling", "ceiling"), ("cp", "cp"))
                   if any(ratios(line, other) for line in members)]
        width = max(len(line.row.label) for line in members) + 2
        better = {"high": "more is better", "low": "less is better"}[members[0].row.better]
        out.append("\n%s%s%s  (%s)" % (style["bold"], section, style["plain"], better))
        head = " " * width + "%6s" % "" + "".join("%15s" % HEADING[key] for key in columns) + "".join("%15s" % text for _, text in against)
        out.append(style["dim"] + head.rstrip() + style["plain"])
        for line in members:
            text = line.row.label.ljust(width) + "%6s" % line.row.unit
            below = " " * len(text)
            for key in columns:
                cell = line.cells.get(key)
                mark = {"qemu-threads": "t", "qemu-uring": "u"}.get(line.best_qemu, "") + " " if key == "qemu" and cell else ""
                text += "%15s" % (mark + number(cell[0]) if cell else "-")
                below += "%15s" % (span(cell) if cell else "")
            text += "".join("%15s" % (ratios(line, other) or "-") for other, _ in against)
            out += [text, style["dim"] + below.rstrip() + style["plain"]]
    return "\n".join(out)


def bars_table(bars, style):
    if not bars:
        return ""
    out = ["\n%sBars%s  (how many times as good as the other; of times and sizes the inverse: 2.00 is half)" % (style["bold"], style["plain"])]
    width = max(len(full_name(line)) for line, *_ in bars) + 2
    out.append(style["dim"] + "%s%-10s%-10s%8s%10s" % (" " * width, "against", "over", "wanted", "measured") + style["plain"])
    for line, other, transport, wanted, measured in bars:
        met = measured >= wanted
        verdict = "%s%s%s" % (style["green" if met else "red"], "met" if met else "MISSED", style["plain"])
        out.append("%-*s%-10s%-10s%8.2f%10.2f  %s" % (width, full_name(line), HEADING.get(other, other), transport, wanted, measured, verdict))
    missed = sum(measured < wanted for *_, wanted, measured in bars)
    out.append("%d of %d bars met" % (len(bars) - missed, len(bars)))
    return "\n".join(out)


def full_name(line):
    """The label of a row, with what its section says where it would not be understood alone."""
    short = {"First touch": "first touch", "Stream the": "stream", "Guest latency": "during a stream", "1 TiB image": "1 TiB image"}
    for begin, words in short.items():
        if line.row.section.startswith(begin):
            return "%s: %s" % (words, line.row.label)
    return line.row.label


def as_json(lines, bars, facts, notes):
    return {
        "facts": facts,
        "notes": notes,
        "workloads": [
            {
                "key": line.key, "section": line.row.section, "label": line.row.label, "unit": line.row.unit, "better": line.row.better,
                "values": line.row.values,
                "summary": {target: dict(zip(("median", "min", "max"), cell)) for target, cell in line.cells.items()},
                "best_qemu": line.best_qemu or None,
                "ratios": {"%s/%s" % (one, other): line.ratio(one, other) for one in ("cordisk-dev", "cordisk-uring")
                           for other in ("qemu", "ceiling", "cp") if line.ratio(one, other) is not None},
            }
            for line in lines
        ],
        "bars": [
            {"key": line.key, "against": other, "transport": transport, "wanted": wanted, "measured": measured, "met": measured >= wanted}
            for line, other, transport, wanted, measured in bars
        ],
    }


# ---- the chart ----

PANEL_WIDTH, GAP, BAR, LABEL, MARGIN = 440, 24, 18, 118, 24
VALUE = 64  # space right of the longest bar for its number


def text(x, y, words, size=12, colour="#1f2933", anchor="start", weight="normal"):
    return '<text x="%.1f" y="%.1f" font-size="%d" fill="%s" text-anchor="%s" font-weight="%s">%s</text>' % (
        x, y, size, colour, anchor, weight, html.escape(words))


def panel(line, x, y):
    """One workload: a bar for each target from zero, a thin line from its smallest to its largest value, the median in figures."""
    arrow = "more is better" if line.row.better == "high" else "less is better"
    out = [text(x, y + 12, line.row.label, 13, weight="bold"), text(x, y + 28, "%s, %s" % (line.row.unit, arrow), 11, "#6b7782")]
    top, room = y + 38, PANEL_WIDTH - LABEL - VALUE
    columns = [key for key, _, _ in COLUMNS if key in line.cells]
    largest = max(line.cells[key][2] for key in columns) or 1
    for place, key in enumerate(columns):
        median, low, high = (value / largest * room for value in line.cells[key])
        middle, left = top + place * BAR + BAR / 2, x + LABEL
        name = HEADING[key] + ({"qemu-threads": " (threads)", "qemu-uring": " (io_uring)"}[line.best_qemu] if key == "qemu" else "")
        out.append(text(left - 8, middle + 4, name, 11, "#3e4c59", "end"))
        out.append('<rect x="%.1f" y="%.1f" width="%.1f" height="%d" fill="%s"/>' % (left, middle - 6, max(median, 1), 12, COLOUR[key]))
        if high - low > 1:
            out.append('<path d="M%.1f %.1fH%.1f" stroke="#1f2933" stroke-width="1"/>' % (left + low, middle, left + high))
        out.append(text(left + max(median, high) + 6, middle + 4, number(line.cells[key][0]), 11))
    return out, 38 + len(columns) * BAR + 14


def svg(lines, facts):
    """All rows as panels, two beside each other, under the headings of their sections."""
    width = 2 * MARGIN + 2 * PANEL_WIDTH + GAP
    body, y = [], MARGIN
    body.append(text(MARGIN, y + 16, "cordisk beside its peers", 20, weight="bold"))
    for number_, words in enumerate((facts["what"], facts["machine"], "Bars: medians. Thin lines: smallest to largest of the rounds.")):
        body.append(text(MARGIN, y + 36 + number_ * 16, words, 12, "#6b7782"))
    y += 36 + 3 * 16 + 8
    for section, members in sections_of(lines).items():
        body.append('<path d="M%d %dH%d" stroke="#d9dee3"/>' % (MARGIN, y, width - MARGIN))
        body.append(text(MARGIN, y + 24, section, 15, weight="bold"))
        y += 42
        for at in range(0, len(members), 2):
            heights = []
            for column, line in enumerate(members[at : at + 2]):
                drawn, height = panel(line, MARGIN + column * (PANEL_WIDTH + GAP), y)
                body += drawn
                heights.append(height)
            y += max(heights)
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="%s">' % (
        width, y + MARGIN, width, y + MARGIN, "DejaVu Sans, Helvetica, Arial, sans-serif")
    return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *body, "</svg>", ""])
