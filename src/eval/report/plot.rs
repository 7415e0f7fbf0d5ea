//! Plots as SVG, without a library: a page must show them wherever it is opened.

use std::fmt::Write;

/// Points joined by a line.
pub(super) struct Curve {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

/// A bar with an interval.
pub(super) struct Bar {
    pub(super) share: f64,
    pub(super) interval: (f64, f64),
    pub(super) label: String,
}

/// Told apart in black and white too, by their lightness.
pub(super) const COLOURS: [&str; 6] = ["#1f3a5f", "#d1495b", "#2a9d8f", "#e9a23b", "#7a5195", "#6c757d"];
const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 280.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 16.0;
const BOTTOM: f64 = 44.0;

pub(super) fn colour(index: usize) -> &'static str {
    COLOURS[index % COLOURS.len()]
}

/// A text that is safe in HTML.
pub(super) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Where numbers lie on the picture.
struct Axes {
    x: (f64, f64),
    y: (f64, f64),
}

impl Axes {
    fn place(&self, x: f64, y: f64) -> (f64, f64) {
        let share = |value: f64, (low, high): (f64, f64)| (value - low) / (high - low);
        (LEFT + share(x, self.x) * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - share(y, self.y) * (HEIGHT - TOP - BOTTOM))
    }

    /// Lines across with their numbers.
    fn grid(&self, percent: bool) -> String {
        let mut svg = String::new();
        for step in 0..=4 {
            let value = self.y.0 + (self.y.1 - self.y.0) * f64::from(step) / 4.0;
            let (_, y) = self.place(self.x.0, value);
            let text = if percent { format!("{:.0} %", 100.0 * value) } else { format!("{value:.2}") };
            let right = WIDTH - RIGHT;
            let _ = write!(
                svg,
                "<line x1='{LEFT}' x2='{right}' y1='{y:.1}' y2='{y:.1}' class='grid'/>\
                 <text x='{:.1}' y='{:.1}' text-anchor='end'>{text}</text>",
                LEFT - 6.0,
                y + 4.0
            );
        }
        svg
    }
}

fn picture(title: &str, inside: &str) -> String {
    let title = escaped(title);
    format!("<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{title}'><title>{title}</title>{inside}</svg>")
}

/// Groups of bars from 0 to 1, one bar for each model.
pub(super) fn bars(title: &str, groups: &[(String, Vec<Option<Bar>>)]) -> String {
    let axes = Axes { x: (0.0, groups.len().max(1) as f64), y: (0.0, 1.0) };
    let mut svg = axes.grid(true);
    for (group, (name, bars)) in groups.iter().enumerate() {
        let width = 0.8 / bars.len().max(1) as f64;
        for (at, bar) in bars.iter().enumerate() {
            let Some(bar) = bar else { continue };
            let from = group as f64 + 0.1 + at as f64 * width;
            let ((left, top), (right, bottom)) = (axes.place(from, bar.share), axes.place(from + width * 0.9, 0.0));
            let middle = (left + right) / 2.0;
            let (low, high) = (axes.place(0.0, bar.interval.0).1, axes.place(0.0, bar.interval.1).1);
            let _ = write!(
                svg,
                "<rect x='{left:.1}' y='{top:.1}' width='{:.1}' height='{:.1}' fill='{}'><title>{}</title></rect>\
                 <line x1='{middle:.1}' x2='{middle:.1}' y1='{low:.1}' y2='{high:.1}' class='interval'/>",
                right - left,
                bottom - top,
                colour(at),
                escaped(&bar.label)
            );
        }
        let (x, y) = axes.place(group as f64 + 0.5, 0.0);
        let _ = write!(svg, "<text x='{x:.1}' y='{:.1}' text-anchor='middle'>{}</text>", y + 18.0, escaped(name));
    }
    picture(title, &svg)
}

/// Lines from the least to the greatest x, y from 0.
pub(super) fn curves(title: &str, x_name: &str, curves: &[Curve], percent: bool) -> String {
    let points = || curves.iter().flat_map(|curve| &curve.points).filter(|(x, y)| x.is_finite() && y.is_finite());
    let least = points().map(|(x, _)| *x).fold(f64::INFINITY, f64::min);
    let most = points().map(|(x, _)| *x).fold(f64::NEG_INFINITY, f64::max);
    let highest = points().map(|(_, y)| *y).fold(0.0, f64::max);
    if least > most {
        return String::new();
    }
    let axes = Axes {
        x: (least, if most > least { most } else { least + 1.0 }),
        y: (0.0, if percent { 1.0 } else { highest.max(1e-9) * 1.05 }),
    };
    let mut svg = axes.grid(percent);
    for value in [axes.x.0, axes.x.1] {
        let (x, y) = axes.place(value, axes.y.0);
        let _ = write!(svg, "<text x='{x:.1}' y='{:.1}' text-anchor='middle'>{value}</text>", y + 18.0);
    }
    let (middle, bottom) = ((LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 8.0);
    let _ = write!(svg, "<text x='{middle}' y='{bottom}' text-anchor='middle'>{}</text>", escaped(x_name));
    for (at, curve) in curves.iter().enumerate() {
        let places = curve.points.iter().filter(|(x, y)| x.is_finite() && y.is_finite());
        let places: Vec<(f64, f64)> = places.map(|(x, y)| axes.place(*x, *y)).collect();
        let path: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let (name, colour) = (escaped(&curve.name), colour(at));
        let _ = write!(
            svg,
            "<polyline points='{}' fill='none' stroke='{colour}' stroke-width='2'><title>{name}</title></polyline>",
            path.join(" ")
        );
        for (x, y) in places.iter().filter(|_| places.len() <= 30) {
            let _ = write!(svg, "<circle cx='{x:.1}' cy='{y:.1}' r='3' fill='{colour}'/>");
        }
    }
    picture(title, &svg)
}

/// Points with names, both axes from 0 to 1.
pub(super) fn points(title: &str, x_name: &str, points: &[(String, f64, f64)]) -> String {
    let axes = Axes { x: (0.0, 1.0), y: (0.0, 1.0) };
    let mut svg = axes.grid(true);
    for step in 0..=4 {
        let (x, y) = axes.place(f64::from(step) / 4.0, 0.0);
        let _ = write!(svg, "<text x='{x:.1}' y='{:.1}' text-anchor='middle'>{} %</text>", y + 18.0, 25 * step);
    }
    let (middle, bottom) = ((LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 8.0);
    let _ = write!(svg, "<text x='{middle}' y='{bottom}' text-anchor='middle'>{}</text>", escaped(x_name));
    for (at, (name, x, y)) in points.iter().enumerate() {
        let (x, y) = axes.place(*x, *y);
        let (name, colour) = (escaped(name), colour(at));
        let _ = write!(svg, "<circle cx='{x:.1}' cy='{y:.1}' r='6' fill='{colour}'><title>{name}</title></circle>");
    }
    picture(title, &svg)
}
