//! The main figures as a table.

use super::{ModelReport, Report, Tally};

/// A line of the table: what it is, and a cell for each model that has one.
struct Row {
    name: String,
    cells: Vec<Option<String>>,
}

pub(super) fn table(report: &Report) -> String {
    let mut rows = vec![Row { name: String::new(), cells: report.models.iter().map(name).collect() }];
    rows.push(Row { name: "---".into(), cells: report.models.iter().map(|_| Some("---".into())).collect() });
    rows.extend(body(report));
    let widths: Vec<usize> = (0..=report.models.len())
        .map(|column| rows.iter().map(|row| cell(row, column).chars().count()).max().unwrap_or(0))
        .collect();
    let line = |row: &Row| {
        let cells = widths.iter().enumerate().map(|(column, width)| format!(" {:<width$} |", cell(row, column)));
        format!("|{}", cells.collect::<String>())
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn name(model: &ModelReport) -> Option<String> {
    Some(model.setup.model.clone())
}

fn cell(row: &Row, column: usize) -> &str {
    match column.checked_sub(1) {
        None => &row.name,
        Some(model) => row.cells[model].as_deref().unwrap_or("-"),
    }
}

fn body(report: &Report) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for (at, model) in report.models.iter().enumerate() {
        let mut put = |name: String, text: String| {
            let row = match rows.iter().position(|row| row.name == name) {
                Some(place) => &mut rows[place],
                None => {
                    rows.push(Row { name, cells: vec![None; report.models.len()] });
                    let last = rows.len() - 1;
                    &mut rows[last]
                }
            };
            row.cells[at] = Some(text);
        };
        for attack in &model.attacks {
            for (judge, success) in &attack.judges {
                put(format!("{}, in the end ({judge})", attack.attack), tally(&success.offered));
                if success.until.len() > 1 {
                    put(format!("{}, any attempt ({judge})", attack.attack), tally(&success.any));
                }
            }
            if let (Some(first), Some(last)) = (attack.losses.first(), attack.losses.last()) {
                put(
                    format!("{}, loss of the target, nats per token", attack.attack),
                    format!("{first:.3} to {last:.3}"),
                );
            }
            put(format!("{}, cost", attack.attack), cost(&attack.cost));
        }
        for (judge, any) in &model.any_attack {
            put(format!("any attack at least once ({judge})"), tally(any));
        }
        for task in &model.tasks {
            for (flag, share) in &task.rates {
                put(format!("{}, {flag}", task.task), with_failed(share.rate.to_string(), task.failed.len()));
            }
            for (number, (mean, items)) in &task.means {
                let text = format!("{mean:.4} ({items} items)");
                put(format!("{}, {number}", task.task), with_failed(text, task.failed.len()));
            }
        }
    }
    rows
}

fn tally(tally: &Tally) -> String {
    let text = tally.harmful.to_string();
    let text = if tally.not_judged > 0 { format!("{text}, {} not judged", tally.not_judged) } else { text };
    with_failed(text, tally.failed)
}

fn with_failed(text: String, failed: usize) -> String {
    if failed > 0 { format!("{text}, {failed} failed") } else { text }
}

fn cost(cost: &super::Cost) -> String {
    let mut parts = Vec::new();
    if cost.forward_passes > 0 {
        parts.push(format!(
            "{} forward, {} backward passes, {} tokens",
            cost.forward_passes, cost.backward_passes, cost.tokens
        ));
    }
    parts.push(format!("{} answers", cost.answers));
    if cost.replies > 0 {
        parts.push(format!("{} replies", cost.replies));
    }
    parts.push(format!("{:.0} s", cost.seconds));
    parts.join(", ")
}
