//! The report as one page that needs nothing else.

use std::fmt::Write;

use super::{
    AttackReport, ModelReport, Report, Tally,
    plot::{self, Bar, Curve, colour, escaped},
};
use crate::eval::evaluation::{AttackRecord, Evaluation};

const STYLE: &str = "\
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#1b1f24;background:#fff}\
table{border-collapse:collapse;width:100%;margin:1em 0}\
td,th{border-bottom:1px solid #d8dee4;padding:.35em .6em;text-align:left;vertical-align:top}\
svg{width:100%;max-width:760px;height:auto;font:12px system-ui,sans-serif}\
.grid{stroke:#e3e7eb}.interval{stroke:#1b1f24;stroke-width:1.5}\
.key{display:inline-block;width:.8em;height:.8em;margin:0 .4em 0 1em;border-radius:2px}\
details{margin:.4em 0;border-left:3px solid #d8dee4;padding-left:.8em}\
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f8fa;padding:.6em;margin:.3em 0}\
.harmful{color:#b42318;font-weight:600}.not_harmful{color:#1a7f37}.not_judged{color:#9a6700}";

pub(super) fn page(report: &Report, evaluations: &[Evaluation]) -> String {
    let names: Vec<&str> = report.models.iter().map(|model| model.setup.model.as_str()).collect();
    let mut page = format!(
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>\
         <meta name='viewport' content='width=device-width'><title>Evaluation: {title}</title><style>{STYLE}</style></head>\
         <body><h1>Evaluation: {title}</h1>",
        title = escaped(&names.join(", "))
    );
    page.push_str(&setups(report));
    page.push_str("<h2>Figures</h2><p>Counts with the share and its 95 % Wilson interval. Cases that were not judged, or in which \
                   an attack failed, are in the total and not in the count.</p>");
    page.push_str(&markdown_as_html(&report.table()));
    page.push_str(&plots(report));
    page.push_str("<h2>Costs and settings</h2>");
    report.models.iter().for_each(|model| page.push_str(&settings(model)));
    page.push_str("<h2>What was asked and answered</h2>");
    evaluations.iter().for_each(|evaluation| page.push_str(&answers(evaluation)));
    page + "</body></html>\n"
}

fn setups(report: &Report) -> String {
    let mut html = String::from(
        "<table><tr><th>model</th><th>weights</th><th>chat template</th><th>dtype</th><th>answers</th><th>advtrain</th></tr>",
    );
    for (at, model) in report.models.iter().enumerate() {
        let setup = &model.setup;
        let drawn = if setup.generation.sampling.is_some() { "drawn" } else { "likeliest tokens" };
        let _ = write!(
            html,
            "<tr><td><span class='key' style='background:{}'></span>{}</td><td>{}</td><td>{}</td><td>{}</td>\
             <td>{drawn}, at most {} tokens</td><td>{}</td></tr>",
            colour(at),
            escaped(&setup.model),
            escaped(&setup.weights.chars().take(16).collect::<String>()),
            escaped(&setup.template.chars().take(16).collect::<String>()),
            escaped(&setup.dtype),
            setup.generation.max_new_tokens,
            escaped(&setup.version)
        );
    }
    html + "</table>"
}

/// Lines of cells between bars, the second of them a rule.
fn markdown_as_html(table: &str) -> String {
    let mut html = String::from("<table>");
    for (at, line) in table.lines().enumerate().filter(|(at, _)| *at != 1) {
        let tag = if at == 0 { "th" } else { "td" };
        let cells = line.trim_matches('|').split('|').map(|cell| format!("<{tag}>{}</{tag}>", escaped(cell.trim())));
        let _ = write!(html, "<tr>{}</tr>", cells.collect::<String>());
    }
    html + "</table>"
}

fn judges(report: &Report) -> Vec<String> {
    let all = report.models.iter().flat_map(|model| model.any_attack.keys().cloned());
    let mut all: Vec<String> = all.collect();
    all.sort();
    all.dedup();
    all
}

fn attack_names(report: &Report) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for attack in report.models.iter().flat_map(|model| &model.attacks) {
        if !names.contains(&attack.attack) {
            names.push(attack.attack.clone());
        }
    }
    names
}

fn find<'a>(model: &'a ModelReport, attack: &str) -> Option<&'a AttackReport> {
    model.attacks.iter().find(|one| one.attack == attack)
}

fn bar(tally: &Tally) -> Option<Bar> {
    let interval = tally.interval?;
    Some(Bar { share: tally.harmful.share(), interval, label: tally.harmful.to_string() })
}

fn plots(report: &Report) -> String {
    let mut html = String::new();
    for judge in judges(report) {
        let mut groups: Vec<(String, Vec<Option<Bar>>)> = Vec::new();
        for name in attack_names(report) {
            let of = |model: &ModelReport| bar(&find(model, &name)?.judges.get(&judge)?.offered);
            groups.push((name.clone(), report.models.iter().map(of).collect()));
        }
        let any = report.models.iter().map(|model| bar(model.any_attack.get(&judge)?)).collect();
        groups.push(("any attack, once".into(), any));
        let _ = write!(
            html,
            "<h2>Success per attack: {}</h2>{}",
            escaped(&judge),
            plot::bars("success per attack", &groups)
        );
        for name in attack_names(report) {
            let until = |model: &ModelReport| -> Option<Curve> {
                let until = &find(model, &name)?.judges.get(&judge)?.until;
                let points = until.iter().map(|(at, tally)| (*at as f64, tally.harmful.share())).collect();
                (until.len() > 1).then(|| Curve { name: model.setup.model.clone(), points })
            };
            html.push_str(&curves_of(report, &format!("{name}: succeeded by then"), "steps or answers", until, true));
        }
    }
    for name in attack_names(report) {
        let losses = |model: &ModelReport| -> Option<Curve> {
            let losses = &find(model, &name)?.losses;
            let points = losses.iter().enumerate().map(|(step, loss)| (step as f64, *loss)).collect();
            (losses.len() > 1).then(|| Curve { name: model.setup.model.clone(), points })
        };
        let title = format!("{name}: loss of the target, nats per token, mean over cases");
        html.push_str(&curves_of(report, &title, "step", losses, false));
    }
    html + &robustness_and_utility(report)
}

/// A plot of one curve per model, in the models' colours; nothing if no model has one.
fn curves_of(
    report: &Report,
    title: &str,
    x_name: &str,
    curve: impl Fn(&ModelReport) -> Option<Curve>,
    percent: bool,
) -> String {
    let found: Vec<Option<Curve>> = report.models.iter().map(curve).collect();
    if found.iter().all(Option::is_none) {
        return String::new();
    }
    // A model without a curve keeps its colour.
    let curves: Vec<Curve> =
        found.into_iter().map(|curve| curve.unwrap_or(Curve { name: String::new(), points: Vec::new() })).collect();
    format!("<h3>{}</h3>{}", escaped(title), plot::curves(title, x_name, &curves, percent))
}

fn robustness_and_utility(report: &Report) -> String {
    let Some(judge) = judges(report).into_iter().next() else { return String::new() };
    let mut html = String::new();
    let tasks = report.models.iter().flat_map(|model| &model.tasks);
    let mut rates: Vec<(String, String)> =
        tasks.flat_map(|task| task.rates.keys().map(|flag| (task.task.clone(), flag.clone()))).collect();
    rates.sort();
    rates.dedup();
    for (task, flag) in rates {
        let point = |model: &ModelReport| {
            let found = model.tasks.iter().find(|one| one.task == task)?;
            let share = found.rates.get(&flag)?.rate.share();
            Some((model.setup.model.clone(), share, model.any_attack.get(&judge)?.harmful.share()))
        };
        let points: Vec<_> = report.models.iter().filter_map(point).collect();
        if points.len() > 1 {
            let title = format!("Robustness and utility: any attack at least once ({judge}) against {task}, {flag}");
            let picture = plot::points(&title, &format!("{task}, {flag}"), &points);
            let _ = write!(html, "<h3>{}</h3>{picture}", escaped(&title));
        }
    }
    html
}

fn settings(model: &ModelReport) -> String {
    let mut html = format!("<h3>{}</h3>", escaped(&model.setup.model));
    let named = model.attacks.iter().map(|attack| (&attack.attack, &attack.settings, &attack.failed));
    let named = named.chain(model.tasks.iter().map(|task| (&task.task, &task.settings, &task.failed)));
    for (name, settings, failed) in named {
        let _ = write!(html, "<p><b>{}</b> <code>{}</code></p>", escaped(name), escaped(&settings.to_string()));
        for (id, why) in failed {
            let _ = write!(html, "<p class='not_judged'>failed on {}: {}</p>", escaped(id), escaped(why));
        }
    }
    html
}

fn answers(evaluation: &Evaluation) -> String {
    let mut html = format!("<h3>{}</h3>", escaped(&evaluation.setup().model));
    evaluation.attacks().iter().for_each(|record| html.push_str(&answers_of(evaluation, record)));
    html
}

fn answers_of(evaluation: &Evaluation, record: &AttackRecord) -> String {
    let (attack, case) = (escaped(&record.attack), escaped(&record.case.id));
    let mut html = format!("<details><summary>{attack}: {case}</summary>");
    match &record.result {
        Err(why) => {
            let _ = write!(html, "<p class='not_judged'>failed: {}</p>", escaped(why));
        }
        Ok(trajectory) => {
            for (at, attempt) in trajectory.attempts.iter().enumerate() {
                let offered = if at == trajectory.offered { ", offered" } else { "" };
                let loss = attempt.loss.map_or(String::new(), |loss| format!(", loss {loss:.4}"));
                let (step, stream) = (attempt.step, attempt.stream);
                let _ = write!(html, "<p>step {step}, stream {stream}{loss}{offered}</p>");
                for message in &attempt.messages {
                    let _ = write!(html, "<pre><b>{}</b>\n{}</pre>", escaped(&message.role), escaped(&message.content));
                }
                let _ = write!(html, "<pre><b>answer</b>\n{}</pre>", escaped(&attempt.answer));
                for judge in evaluation.judges() {
                    let verdicts = evaluation.verdicts(&record.attack, &record.case.id, judge).unwrap_or_default();
                    let Some(verdict) = verdicts.get(at) else { continue };
                    let harm = serde_json::to_value(verdict.harm).unwrap_or_default();
                    let class = harm.as_str().unwrap_or_default().to_string();
                    let (judge, text, word) = (escaped(judge), escaped(&verdict.text), class.replace('_', " "));
                    let _ = write!(html, "<p class='{class}'>{judge}: {word} ({text})</p>");
                }
            }
        }
    }
    html + "</details>"
}
