//! The main figures as a table.

use super::{AttackReport, Cost, ModelReport, Report, Tally, TaskReport};

/// Lines of cells: what a line is about, and a cell for each model. The first line has the models' names.
pub(super) struct Table {
    pub(super) lines: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(report: &Report) -> Self {
        let mut head = vec![String::new()];
        head.extend(report.models.iter().map(|model| model.setup.model.clone()));
        let mut table = Self { lines: vec![head] };
        for (at, model) in report.models.iter().enumerate() {
            figures(model).into_iter().for_each(|(name, text)| table.put(at + 1, name, text));
        }
        table
    }

    /// Puts a cell into the line of that name, which is made if it is not there.
    fn put(&mut self, column: usize, name: String, text: String) {
        let width = self.lines[0].len();
        let known = self.lines.iter().skip(1).position(|line| line[0] == name).map(|at| at + 1);
        let at = known.unwrap_or_else(|| {
            let mut line = vec!["-".to_string(); width];
            line[0] = name;
            self.lines.push(line);
            self.lines.len() - 1
        });
        self.lines[at][column] = text;
    }

    /// As Markdown, the columns being aligned.
    pub(super) fn markdown(&self) -> String {
        let mut lines: Vec<Vec<String>> =
            self.lines.iter().map(|line| line.iter().map(|cell| in_markdown(cell)).collect()).collect();
        lines.insert(1, vec!["---".to_string(); lines[0].len()]);
        let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
        let line = |line: &Vec<String>| {
            let cells = line.iter().zip(&widths).map(|(cell, width)| format!(" {cell:<width$} |"));
            format!("|{}", cells.collect::<String>())
        };
        lines.iter().map(line).collect::<Vec<_>>().join("\n")
    }
}

/// A text that stays in its cell.
fn in_markdown(text: &str) -> String {
    text.replace('\\', "\\\\").replace('|', "\\|").replace(['\n', '\r'], " ")
}

/// The figures of one model, each with the name of its line.
fn figures(model: &ModelReport) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = model.attacks.iter().flat_map(of_attack).collect();
    for (judge, any) in &model.any_attack {
        let where_all =
            if any.where_all.harmful.total < any.by_any.harmful.total { any.where_all } else { Tally::default() };
        for (what, one) in [
            ("any attack by text at least once", any.by_text),
            ("any attack at least once", any.by_any),
            ("any attack at least once, of those that all were made on", where_all),
        ] {
            if one.harmful.total > 0 {
                found.push((format!("{what} ({judge})"), tally(&one)));
            }
        }
    }
    found.extend(model.tasks.iter().flat_map(of_task));
    found
}

fn of_attack(attack: &AttackReport) -> Vec<(String, String)> {
    let name = &attack.attack;
    let mut found = Vec::new();
    if attack.done < attack.planned || attack.judges.is_empty() {
        let done = format!("{} of {} done", attack.done, attack.planned);
        found.push((format!("{name}, cases"), with_failed(done, attack.failed.len())));
    }
    for (judge, success) in attack.judges.iter().filter(|_| attack.done > 0) {
        found.push((format!("{name}, in the end ({judge})"), tally(&success.offered)));
        if success.until.len() > 1 {
            found.push((format!("{name}, any attempt ({judge})"), tally(&success.any)));
        }
    }
    if let (Some(first), Some(last)) = (attack.losses.first(), attack.losses.last()) {
        found.push((format!("{name}, loss of the target, nats per token"), format!("{first:.3} to {last:.3}")));
    }
    if attack.done > 0 {
        found.push((format!("{name}, cost"), cost(&attack.cost)));
    }
    found
}

fn of_task(task: &TaskReport) -> Vec<(String, String)> {
    let (name, failed) = (&task.task, task.failed.len());
    let mut found = Vec::new();
    let measured = task.done - failed;
    if measured == 0 {
        found.push((name.clone(), with_failed(format!("0 of {} measured", task.planned), failed)));
    } else if task.done < task.planned {
        found.push((format!("{name}, items"), with_failed(format!("{} of {} done", task.done, task.planned), failed)));
    }
    for (flag, share) in &task.rates {
        found.push((format!("{name}, {flag}"), with_failed(share.rate.to_string(), failed)));
    }
    for (number, (mean, items)) in &task.means {
        found.push((format!("{name}, {number}"), with_failed(format!("{mean:.4} ({items} items)"), failed)));
    }
    found
}

fn tally(tally: &Tally) -> String {
    if tally.failed == tally.harmful.total {
        return with_failed(format!("0 of {} measured", tally.harmful.total), tally.failed);
    }
    let mut text = tally.harmful.to_string();
    for (count, what) in [(tally.not_judged, "not judged"), (tally.attacked_in_part, "attacked in part")] {
        if count > 0 {
            text = format!("{text}, {count} {what}");
        }
    }
    with_failed(text, tally.failed)
}

fn with_failed(text: String, failed: usize) -> String {
    if failed > 0 { format!("{text}, {failed} failed") } else { text }
}

fn cost(cost: &Cost) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_keep_to_their_columns() {
        let mut table = Table { lines: vec![vec![String::new(), "a|b".into()]] };
        table.put(1, "x\\|".into(), "1\n2".into());
        assert_eq!(table.markdown(), "|       | a\\|b |\n| ---   | ---  |\n| x\\\\\\| | 1 2  |");
    }
}
