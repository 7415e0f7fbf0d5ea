//! Plots as SVG, without a library: a page must show them wherever it is opened, in its own type and with words that
//! its reader can point at.

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

/// What stands below and above the axes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Names<'a> {
    pub(super) x: &'a str,
    pub(super) y: &'a str,
}

/// What an axis shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scale {
    /// Shares from 0 to 1, as percent.
    Share,
    /// Numbers from the least to the greatest.
    Number,
    /// Numbers from 0 to the greatest.
    FromZero,
}

/// Told apart in black and white too, by their lightness.
const COLOURS: [&str; 6] = ["#1f3a5f", "#d1495b", "#2a9d8f", "#e9a23b", "#7a5195", "#6c757d"];
const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 28.0;
const BOTTOM: f64 = 44.0;

pub(super) fn colour(index: usize) -> &'static str {
    COLOURS[index % COLOURS.len()]
}

/// A text that is safe in HTML, within quotes of either kind too.
pub(super) fn escaped(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    text.replace('"', "&quot;").replace('\'', "&#39;")
}

/// A picture under its title, with the models that have something in it.
pub(super) fn figure(title: &str, models: &[(usize, &str)], picture: &str) -> String {
    let key = |(at, name): &(usize, &str)| {
        format!("<span><span class='key' style='background:{}'></span>{}</span> ", colour(*at), escaped(name))
    };
    let keys = models.iter().map(key).collect::<String>();
    format!("<figure><figcaption>{}</figcaption><p class='keys'>{keys}</p>{picture}</figure>", escaped(title))
}

/// Numbers at even distances of 1, 2 or 5 times a power of ten, and how many digits behind the point they need.
fn ticks((low, high): (f64, f64)) -> (Vec<f64>, usize) {
    let about = (high - low) / 5.0;
    let power = 10_f64.powf(about.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|times| times * power).into_iter().find(|step| *step >= about * 0.999);
    let step = step.unwrap_or(about);
    let first = (low / step - 1e-9).ceil();
    let all = (0..8).map(|at| (first + f64::from(at)) * step).take_while(|tick| *tick <= high + step * 1e-9);
    // Minus zero is written as such.
    (all.map(|tick| tick + 0.0).collect(), (-step.log10().floor()).clamp(0.0, 8.0) as usize)
}

fn range(scale: Scale, values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let (least, most) = (values.clone().fold(f64::INFINITY, f64::min), values.fold(f64::NEG_INFINITY, f64::max));
    match scale {
        Scale::Share => (0.0, 1.0),
        Scale::FromZero => (0.0, if most > 0.0 { most * 1.05 } else { 1.0 }),
        Scale::Number if most > least => (least, most),
        Scale::Number => (least - 0.5, least + 0.5),
    }
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

    /// Lines across with their numbers, numbers below, and the names of both axes.
    fn drawn(&self, (x_scale, y_scale): (Scale, Scale), names: Names) -> String {
        let mut svg = String::new();
        let (steps, digits) = ticks(self.y);
        for value in steps {
            let (_, y) = self.place(self.x.0, value);
            let _ = write!(
                svg,
                "<line x1='{LEFT}' x2='{:.1}' y1='{y:.1}' y2='{y:.1}' class='grid'/>\
                 <text x='{:.1}' y='{:.1}' text-anchor='end'>{}</text>",
                WIDTH - RIGHT,
                LEFT - 6.0,
                y + 4.0,
                number(value, y_scale, digits)
            );
        }
        let (steps, digits) = ticks(self.x);
        for value in steps {
            let (x, y) = self.place(value, self.y.0);
            let text = number(value, x_scale, digits);
            let _ = write!(svg, "<text x='{x:.1}' y='{:.1}' text-anchor='middle'>{text}</text>", y + 18.0);
        }
        let (middle, bottom) = ((LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 6.0);
        let _ = write!(
            svg,
            "<text x='{middle}' y='{bottom}' text-anchor='middle'>{}</text><text x='2' y='12'>{}</text>",
            escaped(names.x),
            escaped(names.y)
        );
        svg
    }
}

fn number(value: f64, scale: Scale, digits: usize) -> String {
    if scale == Scale::Share { format!("{:.0} %", 100.0 * value) } else { format!("{value:.digits$}") }
}

fn picture(title: &str, height: f64, inside: &str) -> String {
    let title = escaped(title);
    format!("<svg viewBox='0 0 {WIDTH} {height}' role='img' aria-label='{title}'>{inside}</svg>")
}

/// How much of a name stands beside its bars; the rest is told where one points at it.
const NAME: usize = 26;
const NAMES: f64 = 190.0;
const LABELS: f64 = 70.0;
const BAR: f64 = 16.0;

/// Groups of bars from 0 to 1 that lie below each other, one bar for each model.
pub(super) fn bars(title: &str, groups: &[(String, Vec<Option<Bar>>)]) -> String {
    let across = |share: f64| NAMES + share * (WIDTH - NAMES - LABELS);
    let heights = groups.iter().map(|(_, bars)| BAR * bars.len().max(1) as f64 + 10.0);
    let bottom: f64 = heights.clone().sum();
    let mut svg = String::new();
    for step in 0..=4 {
        let share = f64::from(step) / 4.0;
        let x = across(share);
        let _ = write!(
            svg,
            "<line x1='{x:.1}' x2='{x:.1}' y1='0' y2='{bottom:.1}' class='grid'/>\
             <text x='{x:.1}' y='{:.1}' text-anchor='middle'>{:.0} %</text>",
            bottom + 16.0,
            100.0 * share
        );
    }
    let mut top = 0.0;
    for ((name, bars), height) in groups.iter().zip(heights) {
        let shown: String = name.chars().take(NAME).collect();
        let shown = if shown.len() < name.len() { format!("{shown}…") } else { shown };
        let _ = write!(
            svg,
            "<text x='{:.1}' y='{:.1}' text-anchor='end'>{}<title>{}</title></text>",
            NAMES - 8.0,
            top + height / 2.0 + 4.0,
            escaped(&shown),
            escaped(name)
        );
        for (at, bar) in bars.iter().enumerate() {
            let Some(bar) = bar else { continue };
            let (y, (low, high)) = (top + 5.0 + BAR * at as f64, bar.interval);
            let middle = y + BAR / 2.0;
            let _ = write!(
                svg,
                "<rect x='{NAMES}' y='{:.1}' width='{:.1}' height='{:.1}' fill='{}'/>\
                 <path d='M{:.1} {middle:.1}H{:.1}' class='halo'/><path d='M{:.1} {middle:.1}H{:.1}' class='interval'/>\
                 <text x='{:.1}' y='{:.1}'>{}</text>",
                y + 1.0,
                // A sliver of none, so that its model can be told.
                (across(bar.share) - NAMES).max(1.5),
                BAR - 2.0,
                colour(at),
                across(low),
                across(high),
                across(low),
                across(high),
                across(1.0) + 6.0,
                middle + 4.0,
                escaped(&bar.label)
            );
        }
        top += height;
    }
    picture(title, bottom + 24.0, &svg)
}

/// Lines from the least to the greatest x, y from 0.
pub(super) fn curves(title: &str, names: Names, curves: &[Option<Curve>], y_scale: Scale) -> String {
    let points = || curves.iter().flatten().flat_map(|curve| curve.points.iter().copied());
    let x = range(Scale::Number, points().map(|(x, _)| x));
    let axes = Axes { x, y: range(y_scale, points().map(|(_, y)| y)) };
    let mut svg = axes.drawn((Scale::Number, y_scale), names);
    for (at, curve) in curves.iter().enumerate() {
        let Some(curve) = curve else { continue };
        let places: Vec<(f64, f64)> = curve.points.iter().map(|(x, y)| axes.place(*x, *y)).collect();
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
    picture(title, HEIGHT, &svg)
}

/// A point for each model that has one, y from 0 to 1.
pub(super) fn points(title: &str, names: Names, points: &[(usize, &str, f64, f64)], x_scale: Scale) -> String {
    let (low, high) = range(x_scale, points.iter().map(|(_, _, x, _)| *x));
    // Points at the edge would hide the numbers there.
    let room = 0.1 * (high - low);
    let axes = Axes { x: (low - room, high + room), y: (0.0, 1.0) };
    let mut svg = axes.drawn((x_scale, Scale::Share), names);
    for (at, name, x, y) in points {
        let (left, top) = axes.place(*x, *y);
        let (name, colour) = (escaped(name), colour(*at));
        let _ = write!(
            svg,
            "<circle cx='{left:.1}' cy='{top:.1}' r='6' fill='{colour}' fill-opacity='0.85'><title>{name}: {}, {}\
             </title></circle>",
            number(*x, x_scale, 4),
            number(*y, Scale::Share, 0)
        );
    }
    picture(title, HEIGHT, &svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_numbers_inside_the_range() {
        assert_eq!(ticks((0.0, 50.0)), (vec![0.0, 10.0, 20.0, 30.0, 40.0, 50.0], 0));
        let texts = |low, high| -> Vec<String> {
            let (found, digits) = ticks((low, high));
            found.into_iter().map(|tick| number(tick, Scale::Number, digits)).collect()
        };
        assert_eq!(texts(0.0, 1.0), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(texts(0.0123, 0.0131), ["0.0124", "0.0126", "0.0128", "0.0130"]);
        assert_eq!(texts(-0.5, 0.5), ["-0.4", "-0.2", "0.0", "0.2", "0.4"]);
    }

    #[test]
    fn all_that_html_takes_for_itself_is_escaped() {
        assert_eq!(escaped(r#"<b a="1" c='2'>&"#), "&lt;b a=&quot;1&quot; c=&#39;2&#39;&gt;&amp;");
    }

    #[test]
    fn long_names_are_cut_and_told_whole() {
        let bar = Bar { share: 0.5, interval: (0.2, 0.8), label: "1/2".into() };
        let svg = bars("t", &[("x".repeat(40), vec![None, Some(bar)])]);
        assert!(svg.contains(&format!(">{}…<title>{}</title>", "x".repeat(NAME), "x".repeat(40))), "{svg}");
        assert!(svg.contains(colour(1)) && !svg.contains(colour(0)), "{svg}");
    }
}
