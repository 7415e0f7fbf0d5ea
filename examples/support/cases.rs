//! What an evaluation attacks.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
};

use advtrain::{Behavior, Case, load_behaviors, load_targets, split_by_name};
use anyhow::{Context, Result, bail};

use super::inputs::spread;

/// Cases, and what was found while they were read.
#[derive(Debug)]
pub struct Attacked {
    pub cases: Vec<Case>,
    /// Behaviours that are no cases, and why.
    pub left_out: BTreeMap<String, String>,
    pub notes: Vec<String>,
}

impl Attacked {
    /// At most so many cases, at even distances; notes which, if they are not all.
    pub fn searched(&mut self, most: usize) -> Vec<Case> {
        let searched = spread(self.cases.clone(), most);
        if searched.len() < self.cases.len() {
            let ids = searched.iter().map(|case| case.id.as_str()).collect::<Vec<_>>().join(", ");
            self.notes.push(format!(
                "prompts are searched against {} of {} behaviours: {ids}",
                searched.len(),
                self.cases.len()
            ));
        }
        searched
    }
}

const HASH_CHECK: &str = "left out: tagged hash_check, its harm is decided by comparing hashes and not by a judge";

/// Which behaviours of a file are attacked.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Those of one category.
    pub category: Option<&'a str>,
    /// Those that a training with this share and seed holds out.
    pub held_out: Option<(f64, u64)>,
    /// At most so many, at even distances.
    pub most: Option<usize>,
}

/// Behaviours with their first targets that hold a text. One without such a target is a case still: attacks that need one
/// fail on it.
pub fn read(behaviors: &Path, targets: &Path, wanted: Wanted) -> Result<Attacked> {
    let Wanted { category, held_out: wanted_share, most } = wanted;
    let mut all = load_behaviors(behaviors)?;
    let targets: HashMap<String, Vec<String>> = load_targets(targets)?.into_iter().collect();
    let mut notes = targets_without_behavior(&all, &targets);
    if let Some((share, seed)) = wanted_share {
        let (_, held_out) = split_by_name(all.iter().map(|one| &one.id), share, seed).context("--held-out")?;
        notes.push(format!("{} of {} behaviours are held out with {share} and seed {seed}", held_out.len(), all.len()));
        all = held_out.into_iter().map(|index| all[index].clone()).collect();
    }
    let there: BTreeSet<&str> = all.iter().filter_map(|one| one.functional_category.as_deref()).collect();
    let wanted = |one: &&Behavior| category.is_none() || one.functional_category.as_deref() == category;
    let (left_out, attacked): (Vec<&Behavior>, Vec<&Behavior>) =
        all.iter().filter(wanted).partition(|one| one.is_hash_check());
    if attacked.is_empty() {
        let held_out = wanted_share.map_or(String::new(), |(share, seed)| {
            format!(" among those that are held out with a share of {share} and seed {seed}")
        });
        let of = category.map_or(String::new(), |category| format!(" of the category {category}; there are {there:?}"));
        bail!("{}: holds no behaviour to attack{held_out}{of}", behaviors.display());
    }
    let most = most.unwrap_or(attacked.len());
    let mut cases = Vec::new();
    for behavior in spread(attacked, most) {
        let filled = targets.get(&behavior.id).and_then(|list| list.iter().find(|target| !target.trim().is_empty()));
        if filled.is_none() {
            notes.push(format!("{}: has no target that holds a text; attacks that need one fail on it", behavior.id));
        }
        cases.push(Case::new(behavior, filled.map(String::as_str).unwrap_or_default()));
    }
    let left_out = left_out.into_iter().map(|one| (one.id.clone(), HASH_CHECK.to_string())).collect();
    Ok(Attacked { cases, left_out, notes })
}

fn targets_without_behavior(behaviors: &[Behavior], targets: &HashMap<String, Vec<String>>) -> Vec<String> {
    let known: BTreeSet<&str> = behaviors.iter().map(|one| one.id.as_str()).collect();
    let unknown: BTreeSet<&str> = targets.keys().map(String::as_str).filter(|id| !known.contains(id)).collect();
    let note = |ids: &BTreeSet<&str>| format!("targets without a behaviour: {}", some_of(ids.iter().copied()));
    if unknown.is_empty() { Vec::new() } else { vec![note(&unknown)] }
}

/// The first ids, and how many there are.
pub fn some_of<'a>(ids: impl Iterator<Item = &'a str> + Clone) -> String {
    let (count, first) = (ids.clone().count(), ids.take(5).collect::<Vec<_>>().join(", "));
    if count > 5 { format!("{first}, … ({count})") } else { first }
}
