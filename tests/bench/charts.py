"""Line and bar charts as SVG, readable on light ground and on dark.

    Path("rate.svg").write_text(lines("Accepted", "sessions", "messages/s", {"smtp": [(1, 90), (5, 400)]}))
"""
import math
from html import escape

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 96, 44, 52       # from the plot to the picture's edges
COLOURS = ("#d1495b", "#2f7fb5", "#3d9b62", "#b8860b", "#8a63b8", "#5f6b76")
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #333 }
.title { font-size: 15px; font-weight: 600 }
.grid { stroke: #ddd } .axis { stroke: #888 }
@media (prefers-color-scheme: dark) { text { fill: #ccc } .grid { stroke: #444 } }
"""


def _number(value):
    """As short as a tick can be."""
    return f"{value / 1000:g}k" if value >= 10000 else f"{value:g}"


def _text(x, y, words, anchor="start", more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(words)}</text>'


def _line(x1, y1, x2, y2, kind):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


class Scale:
    """Values to places between `start` and `end`; by their logarithm, where `log`."""

    def __init__(self, values, start, end, log):
        self.start, self.end, self.log = start, end, log
        most = max(values)
        if log:
            self.low, self.high = math.log10(min(values)), math.log10(most)
            if self.low == self.high:
                self.low, self.high = self.low - 0.5, self.high + 0.5
        else:
            self.step = self._step(most)
            self.low, self.high = 0, math.ceil(most / self.step) * self.step

    @staticmethod
    def _step(most):
        """1, 2 or 5 times a power of ten, so that there are eight steps at most."""
        power = 10 ** math.floor(math.log10(most / 8))
        return next(power * factor for factor in (1, 2, 5, 10) if power * factor * 8 >= most)

    def widen(self):
        """To whole powers of ten."""
        self.low, self.high = math.floor(self.low), math.ceil(self.high)
        return self

    def ticks(self):
        if self.log:
            return [10 ** power for power in range(self.low, self.high + 1)]
        return [self.step * i for i in range(round(self.high / self.step) + 1)]

    def __call__(self, value):
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _picture(title, parts):
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
                      f' aria-label="{escape(title)}">', f"<style>{STYLE}</style>",
                      _text(LEFT, 24, title, more=' class="title"'), *parts, "</svg>", ""])


def _axes(scale, label):
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts = [_text(16, middle, label, "middle", f' transform="rotate(-90 16 {middle:.1f})"')]
    for tick in scale.ticks():
        y = scale(tick)
        parts += [_line(LEFT, y, WIDTH - RIGHT, y, "grid"), _text(LEFT - 6, y + 4, _number(tick), "end")]
    return parts + [_line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis")]


def _apart(places, distance=14):
    """The places, in their order, moved down where names at them would overlap."""
    moved, last = {}, -math.inf
    for name, y in sorted(places.items(), key=lambda item: item[1]):
        last = moved[name] = max(y, last + distance)
    return moved


def lines(title, x_label, y_label, series, log_y=False):
    """One line for each name in `series`, a list of (x, y); x by its logarithm."""
    xs = sorted({x for line in series.values() for x, _ in line})
    ys = [y for line in series.values() for _, y in line]
    x_scale = Scale(xs, LEFT + 16, WIDTH - RIGHT - 16, True)
    y_scale = Scale(ys, HEIGHT - BOTTOM, TOP, log_y)
    parts = _axes(y_scale.widen() if log_y else y_scale, y_label)
    parts += [_text(x_scale(x), HEIGHT - BOTTOM + 18, _number(x), "middle") for x in xs]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_label, "middle"))
    names = _apart({name: y_scale(line[-1][1]) for name, line in series.items()})
    for colour, (name, line) in zip(COLOURS, series.items()):
        places = [(x_scale(x), y_scale(y)) for x, y in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        parts.append(_text(places[-1][0] + 8, names[name] + 4, name, more=f' style="fill: {colour}"'))
    return _picture(title, parts)


def bars(title, unit, values):
    """One bar for each name in `values`: (middle, least, most)."""
    scale = Scale([most for _, _, most in values.values()], HEIGHT - BOTTOM, TOP, False)
    parts = _axes(scale, unit)
    slot = (WIDTH - LEFT - RIGHT) / len(values)
    for i, (colour, (name, (middle, least, most))) in enumerate(zip(COLOURS, values.items())):
        centre, width = LEFT + slot * (i + 0.5), slot * 0.6
        parts.append(f'<rect x="{centre - width / 2:.1f}" y="{scale(middle):.1f}" width="{width:.1f}"'
                     f' height="{HEIGHT - BOTTOM - scale(middle):.1f}" fill="{colour}"/>')
        parts.append(_line(centre, scale(least), centre, scale(most), "axis"))
        parts.append(_text(centre, HEIGHT - BOTTOM + 18, name, "middle"))
        parts.append(_text(centre, scale(most) - 6, f"{middle:.3g}", "middle"))
    return _picture(title, parts)
