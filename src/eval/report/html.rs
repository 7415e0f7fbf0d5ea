//! The report as one page that needs nothing else.

use std::{collections::BTreeSet, fmt::Write};

use super::{
    AnyAttack, AttackReport, LOSS, ModelReport, PERPLEXITY, Report, Tally, answers,
    plot::{self, Bar, Curve, Names, Scale, colour, escaped},
    table::Table,
};
use crate::Evaluation;

const STYLE: &str = "\
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#1b1f24;background:#fff}\
table{border-collapse:collapse;width:100%;margin:1em 0}\
td,th{border-bottom:1px solid #d8dee4;padding:.35em .6em;text-align:left;vertical-align:top;overflow-wrap:anywhere}\
figure{margin:1.5em 0;max-width:760px}figcaption{font-weight:600}.keys{margin:.2em 0}\
svg{width:100%;height:auto;font:12px system-ui,sans-serif}\
.grid{stroke:#e3e7eb}.halo{stroke:#fff;stroke-width:4}.interval{stroke:#1b1f24;stroke-width:1.5}\
.key{display:inline-block;width:.8em;height:.8em;margin:0 .4em 0 0;border-radius:2px}.keys>span{margin-right:1em}\
details{margin:.4em 0;border-left:3px solid #d8dee4;padding-left:.8em}\
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f8fa;padding:.6em;margin:.3em 0}\
code{overflow-wrap:anywhere}\
.harmful{color:#b42318;font-weight:600}.not_harmful{color:#1a7f37}.not_judged{color:#9a6700}";

pub(super) fn page(report: &Report, evaluations: &[Evaluation]) -> String {
    let names: Vec<&str> = report.models.iter().map(|model| model.setup.model.as_str()).collect();
    let mut page = format!(
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>\
         <meta name='viewport' content='width=device-width'><title>Evaluation: {title}</title>\
         <style>{STYLE}</style></head><body><h1>Evaluation: {title}</h1>",
        title = escaped(&names.join(", "))
    );
    page.push_str(&setups(report));
    for note in report.notes() {
        let _ = write!(page, "<p class='not_judged'>{}</p>", escaped(&note));
    }
    page.push_str(
        "<h2>Figures</h2><p>Counts with the share and its 95 % Wilson interval. Cases that were not judged, or in \
         which an attack failed, are in the total and not in the count. Attacked in part: not broken, but an attack on \
         it failed or was not run.</p>",
    );
    page.push_str(&figures(&Table::new(report)));
    page.push_str(&plots(report));
    page.push_str("<h2>Costs, settings and files</h2>");
    report.models.iter().for_each(|model| page.push_str(&details(model)));
    page.push_str("<h2>What was asked and answered</h2>");
    evaluations.iter().for_each(|evaluation| page.push_str(&answers::of(evaluation)));
    page + "</body></html>\n"
}

fn setups(report: &Report) -> String {
    let mut html = String::from(
        "<table><tr><th>model</th><th>weights</th><th>chat template</th><th>computed in</th><th>answers</th>\
         <th>versions</th></tr>",
    );
    for (at, model) in report.models.iter().enumerate() {
        let setup = &model.setup;
        let drawn = if setup.generation.sampling.is_some() { "drawn" } else { "likeliest tokens" };
        let date = setup.date.map_or(String::new(), |date| format!(", printing {date}"));
        let _ = write!(
            html,
            "<tr><td><span class='key' style='background:{}'></span>{}</td><td>{}</td><td>{}{date}</td>\
             <td>{} on {}</td><td>{drawn}, at most {} tokens</td><td>advtrain {}, libtorch {}</td></tr>",
            colour(at),
            escaped(&setup.model),
            escaped(&setup.weights),
            escaped(&setup.template.chars().take(16).collect::<String>()),
            setup.dtype,
            escaped(&setup.device),
            setup.generation.max_new_tokens,
            escaped(&setup.version),
            escaped(&setup.libtorch)
        );
    }
    html + "</table>"
}

fn figures(table: &Table) -> String {
    let mut html = String::from("<table>");
    for (at, line) in table.lines.iter().enumerate() {
        let tag = if at == 0 { "th" } else { "td" };
        let cells = line.iter().map(|cell| format!("<{tag}>{}</{tag}>", escaped(cell)));
        let _ = write!(html, "<tr>{}</tr>", cells.collect::<String>());
    }
    html + "</table>"
}

fn judges(report: &Report) -> BTreeSet<&str> {
    report.models.iter().flat_map(|model| model.any_attack.keys().map(String::as_str)).collect()
}

fn attack_names(report: &Report) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for attack in report.models.iter().flat_map(|model| &model.attacks) {
        if !names.contains(&attack.attack.as_str()) {
            names.push(&attack.attack);
        }
    }
    names
}

fn find<'a>(model: &'a ModelReport, attack: &str) -> Option<&'a AttackReport> {
    model.attacks.iter().find(|one| one.attack == attack)
}

/// A figure with the keys of the models that have something in it.
fn figure<T>(report: &Report, title: &str, has: &[Option<T>], picture: &str) -> String {
    let models = report.models.iter().enumerate().zip(has).filter(|(_, has)| has.is_some());
    let models: Vec<(usize, &str)> = models.map(|((at, model), _)| (at, model.setup.model.as_str())).collect();
    plot::figure(title, &models, picture)
}

fn plots(report: &Report) -> String {
    let mut html = String::new();
    for judge in judges(report) {
        let _ = write!(html, "<h2>Success, judge: {}</h2>", escaped(judge));
        html.push_str(&success_per_attack(report, judge));
        for name in attack_names(report) {
            let until = |model: &ModelReport| -> Option<Curve> {
                let until = &find(model, name)?.judges.get(judge)?.until;
                let points = until.iter().map(|(at, tally)| (*at as f64, tally.harmful.share())).collect();
                (until.len() > 1).then(|| Curve { name: model.setup.model.clone(), points })
            };
            let title = format!("{name}: cases in which an attempt succeeded by then");
            let names = Names { x: "steps done, or answers", y: "cases" };
            html.push_str(&curves_of(report, &title, names, until, Scale::Share));
        }
        html.push_str(&robustness_and_utility(report, judge));
    }
    html.push_str("<h2>Losses along the attacks</h2>");
    for name in attack_names(report) {
        let losses = |model: &ModelReport| -> Option<Curve> {
            let losses = &find(model, name)?.losses;
            let points = losses.iter().enumerate().map(|(step, loss)| (step as f64, *loss)).collect();
            // Two are a start and an end, which the table has.
            (losses.len() > 2).then(|| Curve { name: model.setup.model.clone(), points })
        };
        let title = format!("{name}: loss of the target, nats per token, mean over cases");
        let names = Names { x: "step", y: "nats per token" };
        html.push_str(&curves_of(report, &title, names, losses, Scale::FromZero));
    }
    html
}

fn bar(tally: &Tally) -> Option<Bar> {
    let (interval, harmful) = (tally.interval?, tally.harmful);
    if tally.failed == harmful.total {
        return Some(Bar { share: 0.0, interval: (0.0, 0.0), label: "failed".into() });
    }
    let label = format!("{}/{}", harmful.count, harmful.total);
    Some(Bar { share: harmful.share(), interval, label })
}

/// One of the tallies over several attacks.
type OfAny = fn(&AnyAttack) -> &Tally;

fn success_per_attack(report: &Report, judge: &str) -> String {
    let mut groups: Vec<(String, Vec<Option<Bar>>)> = Vec::new();
    for name in attack_names(report) {
        let of = |model: &ModelReport| bar(&find(model, name)?.judges.get(judge)?.offered);
        groups.push((name.to_string(), report.models.iter().map(of).collect()));
    }
    let any: [(&str, OfAny); 3] = [
        ("any by text, once", |any| &any.by_text),
        ("any, once", |any| &any.by_any),
        ("any, once, where all were made", |any| &any.where_all),
    ];
    for (name, tally) in any {
        let of = |model: &ModelReport| bar(tally(model.any_attack.get(judge)?));
        groups.push((name.to_string(), report.models.iter().map(of).collect()));
    }
    let everyone: Vec<Option<()>> = report.models.iter().map(|_| Some(())).collect();
    figure(
        report,
        "success with what each attack offers in the end, and with any attempt of any attack",
        &everyone,
        &plot::bars("success", &groups),
    )
}

/// A plot of one curve per model, in the models' colours; nothing if no model has one.
fn curves_of(
    report: &Report,
    title: &str,
    names: Names,
    curve: impl Fn(&ModelReport) -> Option<Curve>,
    y_scale: Scale,
) -> String {
    let curves: Vec<Option<Curve>> = report.models.iter().map(curve).collect();
    if curves.iter().all(Option::is_none) {
        return String::new();
    }
    figure(report, title, &curves, &plot::curves(title, names, &curves, y_scale))
}

/// Any attack at least once against each figure of the utility tasks, where two models or more have it: of the cases that all attacks
/// were made on, unless a model has none.
fn robustness_and_utility(report: &Report, judge: &str) -> String {
    let mut html = String::new();
    let mut any = report.models.iter().filter_map(|model| model.any_attack.get(judge));
    let (attacks, tally): (&str, OfAny) = match any.all(|any| any.where_all.interval.is_some()) {
        true => ("any attack at least once where all were made", |any| &any.where_all),
        false => ("any attack at least once", |any| &any.by_any),
    };
    for (task, name, scale) in utility_figures(report) {
        let utility = |model: &ModelReport| {
            let found = model.tasks.iter().find(|one| one.task == task)?;
            let share = found.rates.get(&name).map(|share| share.rate.share());
            share.or_else(|| found.means.get(&name).map(|(mean, _)| *mean))
        };
        let point = |model: &ModelReport| {
            let any = tally(model.any_attack.get(judge)?);
            any.interval.is_some().then_some((utility(model)?, any.harmful.share()))
        };
        let found: Vec<Option<(f64, f64)>> = report.models.iter().map(point).collect();
        let places = report.models.iter().zip(&found).enumerate();
        let places: Vec<(usize, &str, f64, f64)> = places
            .filter_map(|(at, (model, point))| point.map(|(x, y)| (at, model.setup.model.as_str(), x, y)))
            .collect();
        if places.len() > 1 {
            let title = format!("{attacks} against {task}, {name}");
            let names = Names { x: &format!("{task}, {name}"), y: attacks };
            let picture = plot::points(&title, names, &places, scale);
            html.push_str(&figure(report, &title, &found, &picture));
        }
    }
    html
}

/// Task and name of each rate and mean. Of a loss and its perplexity one is enough.
fn utility_figures(report: &Report) -> Vec<(String, String, Scale)> {
    let mut found = Vec::new();
    for task in report.models.iter().flat_map(|model| &model.tasks) {
        let rates = task.rates.keys().map(|name| (name, Scale::Share));
        let means = task.means.keys().filter(|name| *name != LOSS || !task.means.contains_key(PERPLEXITY));
        for (name, scale) in rates.chain(means.map(|name| (name, Scale::Number))) {
            let figure = (task.task.clone(), name.clone(), scale);
            if !found.contains(&figure) {
                found.push(figure);
            }
        }
    }
    found
}

fn details(model: &ModelReport) -> String {
    let mut html = format!("<h3>{}</h3>", escaped(&model.setup.model));
    let inputs = &model.setup.inputs;
    let _ = write!(
        html,
        "<p>{} cases, settings: {}; {} rows at a time</p>",
        inputs.cases,
        escaped(&inputs.settings),
        model.setup.rows
    );
    for file in &inputs.files {
        let (what, path) = (escaped(&file.what), escaped(&file.path.display().to_string()));
        let _ = write!(html, "<p>{what}: {path} <code>{}</code></p>", escaped(&file.digest));
    }
    for (id, why) in &inputs.left_out {
        let _ = write!(html, "<p class='not_judged'>{}: {}</p>", escaped(id), escaped(why));
    }
    for note in &inputs.notes {
        let _ = write!(html, "<p class='not_judged'>{}</p>", escaped(note));
    }
    let attacks = model.attacks.iter().map(|one| (&one.attack, &one.settings, one.cost.seconds, &one.failed));
    let tasks = model.tasks.iter().map(|one| (&one.task, &one.settings, one.seconds, &one.failed));
    for (name, settings, seconds, failed) in attacks.chain(tasks) {
        html.push_str(&setting(name, &settings.to_string(), seconds));
        for (id, why) in failed {
            let _ = write!(html, "<p class='not_judged'>failed on {}: {}</p>", escaped(id), escaped(why));
        }
    }
    for (name, judge) in &model.judges {
        html.push_str(&setting(&format!("judge: {name}"), &judge.settings.to_string(), judge.seconds));
    }
    html
}

fn setting(name: &str, settings: &str, seconds: f64) -> String {
    format!("<p><b>{}</b>, {seconds:.1} s <code>{}</code></p>", escaped(name), escaped(settings))
}
