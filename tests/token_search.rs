//! The search for strings, on models small enough to try everything.

#[path = "common/toy.rs"]
mod toy;

use std::collections::BTreeMap;

use advtrain::{
    AttackSettings, Batch, CausalLm, Continuation, ContinuationKind, Draws, EmbeddingAttack, Example, Input, Pass,
    Perturbation, Positions, Probe, ProbeSampling, Result, SearchLoss, SearchPrompt, TargetCrossEntropy, ThreatModel,
    TokenKind, TokenSearch, TokenSearchSettings, Tokens,
    tch::{Device, Kind, Tensor},
};
use approx::assert_relative_eq;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use toy::{VOCABULARY, attacked, batch, cross_entropy, decoder, numbers, robust};

fn prompt() -> SearchPrompt {
    SearchPrompt { before: vec![1, 2, 9], behind: vec![3], target: vec![7, 11, 5] }
}

fn all() -> Vec<i64> {
    (0..VOCABULARY).collect()
}

fn settings() -> TokenSearchSettings {
    TokenSearchSettings { width: 60, top_k: 8, rows: 7, ..TokenSearchSettings::default() }
}

fn search<'a>(
    model: &'a dyn CausalLm,
    prompts: &[SearchPrompt],
    settings: TokenSearchSettings,
    allowed: &[i64],
    reads_back: impl Fn(&[i64]) -> bool + 'a,
) -> TokenSearch<'a> {
    let (start, random) = ([vec![4, 4, 4]], ChaCha8Rng::seed_from_u64(5));
    let reads_back = Box::new(move |ids: &[i64]| Ok(reads_back(ids)));
    TokenSearch::new(model, prompts, &start, allowed, settings, random, reads_back).unwrap()
}

/// Cross-entropies of the target's tokens behind a string, from the logits of one plain text.
fn losses_by_hand(model: &dyn CausalLm, prompt: &SearchPrompt, string: &[i64]) -> Vec<f64> {
    let text = [&prompt.before[..], string, &prompt.behind].concat();
    let tokens = Tokens::of_kind(prompt.target.clone(), TokenKind::Target);
    let answer = Continuation { kind: ContinuationKind::Harmful, tokens };
    let example = Example::new("e", Tokens::of_kind(text.clone(), TokenKind::User), vec![answer]).unwrap();
    let batch = Batch::new(vec![example], Device::Cpu).unwrap();
    let hidden = model.hidden(&Input::of_batch(model, &batch, None, Pass::default()).unwrap()).unwrap();
    let log_probs = model.logits(&hidden.last).unwrap().log_softmax(-1, Kind::Double);
    let of = |(at, id): (usize, &i64)| -log_probs.double_value(&[(text.len() + at) as i64 - 1, *id]);
    prompt.target.iter().enumerate().map(of).collect()
}

fn mean(numbers: &[f64]) -> f64 {
    numbers.iter().sum::<f64>() / numbers.len() as f64
}

#[test]
fn losses_are_those_of_the_whole_text() {
    let model = decoder();
    let sharpness = 1.5;
    for loss in [SearchLoss::CrossEntropy, SearchLoss::Mellowmax { sharpness }] {
        let mut search = search(&model, &[prompt()], TokenSearchSettings { loss, ..settings() }, &all(), |_| true);
        let by_hand = |string: &[i64]| {
            let losses = losses_by_hand(&model, &prompt(), string);
            match loss {
                SearchLoss::CrossEntropy => mean(&losses),
                SearchLoss::Mellowmax { .. } => {
                    let powers: Vec<f64> = losses.iter().map(|loss| (sharpness * loss).exp()).collect();
                    mean(&powers).ln() / sharpness
                }
            }
        };
        assert_relative_eq!(search.best().loss, by_hand(&[4, 4, 4]), max_relative = 1e-9);
        let step = search.step().unwrap();
        assert_relative_eq!(step.found.loss, by_hand(&step.found.ids), max_relative = 1e-9);
    }
}

/// Of every string that differs in one token, the gradient's first choices hold the best.
#[test]
fn a_step_that_tries_everything_finds_the_best_neighbour() {
    let model = decoder();
    let neighbours = (0..3).flat_map(|at| all().into_iter().map(move |id| (at, id)));
    let best = neighbours
        .map(|(at, id)| {
            let mut string = vec![4, 4, 4];
            string[at] = id;
            mean(&losses_by_hand(&model, &prompt(), &string))
        })
        .fold(f64::INFINITY, f64::min);
    let settings = TokenSearchSettings {
        width: 3 * VOCABULARY as usize * 8,
        top_k: VOCABULARY as usize,
        positions: Positions::Spread,
        ..settings()
    };
    let step = search(&model, &[prompt()], settings, &all(), |_| true).step().unwrap();
    assert_relative_eq!(step.found.loss, best, max_relative = 1e-9);
}

/// Against differences of losses by hand; and with one token per position the candidates are what it points at.
#[test]
fn the_gradient_is_towards_one_hot_rows() {
    let model = decoder();
    let string = [4, 4, 4];
    let table = model.embedding().to_kind(Kind::Double);
    let slope = |at: usize, id: i64| {
        let loss = |share: f64| {
            let text = [&prompt().before[..], &string, &prompt().behind].concat();
            let tokens = Tokens::of_kind(prompt().target, TokenKind::Target);
            let answer = Continuation { kind: ContinuationKind::Harmful, tokens };
            let example = Example::new("e", Tokens::of_kind(text, TokenKind::User), vec![answer]).unwrap();
            let batch = Batch::new(vec![example], Device::Cpu).unwrap();
            let embeddings = model.embed(batch.ids()).unwrap();
            let mut row = embeddings.get(3 + at as i64);
            row += table.get(id) * share;
            let input = Input::of_embeddings(embeddings, batch.layout(), Pass::default()).unwrap();
            let hidden = model.hidden(&input).unwrap();
            let targets = batch.targets(ContinuationKind::Harmful).unwrap();
            let log_probs = model.log_probs(&hidden.predicting(&targets).unwrap(), &targets.ids).unwrap();
            -mean(&numbers(&log_probs))
        };
        (loss(1e-5) - loss(-1e-5)) / 2e-5
    };
    let gradient = search(&model, &[prompt()], settings(), &all(), |_| true).gradients().unwrap().remove(0);
    for at in 0..3 {
        for id in all() {
            assert_relative_eq!(
                gradient.double_value(&[at as i64, id]),
                slope(at, id),
                max_relative = 1e-4,
                epsilon = 1e-8
            );
        }
        let steepest = all().into_iter().min_by(|a, b| slope(at, *a).total_cmp(&slope(at, *b))).unwrap();
        let settings = TokenSearchSettings { top_k: 1, width: 3, positions: Positions::Spread, ..settings() };
        let seen = std::cell::RefCell::new(Vec::new());
        let keep = |ids: &[i64]| {
            seen.borrow_mut().push(ids.to_vec());
            true
        };
        search(&model, &[prompt()], settings, &all(), keep).step().unwrap();
        assert_eq!(seen.borrow()[at][at], steepest, "position {at}");
    }
}

#[test]
fn losses_of_several_conversations_are_averaged() {
    let model = decoder();
    let other = SearchPrompt { before: vec![], behind: vec![8, 3], target: vec![2] };
    let prompts = [prompt(), other.clone()];
    let mut search = search(&model, &prompts, settings(), &all(), |_| true);
    let step = search.step().unwrap();
    let by_hand = prompts.each_ref().map(|prompt| mean(&losses_by_hand(&model, prompt, &step.found.ids)));
    assert_relative_eq!(step.found.loss, mean(&by_hand), max_relative = 1e-9);
}

#[test]
fn a_search_goes_down_and_keeps_its_best() {
    let model = decoder();
    for buffer in [0, 4] {
        let mut search = search(&model, &[prompt()], TokenSearchSettings { buffer, ..settings() }, &all(), |_| true);
        let start = search.best().loss;
        let losses: Vec<f64> = (0..12).map(|_| search.step().unwrap().found.loss).collect();
        let least = losses.iter().copied().fold(start, f64::min);
        assert_eq!(search.best().loss, least);
        assert!(least < 0.7 * start, "{buffer}: {start} to {least}");
    }
}

#[test]
fn same_seed_same_search() {
    let model = decoder();
    let run = |rows| {
        let mut search = search(&model, &[prompt()], TokenSearchSettings { rows, ..settings() }, &all(), |_| true);
        (0..4).map(|_| search.step().unwrap().found.ids).collect::<Vec<_>>()
    };
    assert_eq!(run(7), run(7));
    assert_eq!(run(7), run(60));
}

#[test]
fn only_allowed_tokens_that_are_read_back_are_used() {
    let model = decoder();
    let allowed = [5, 6, 7, 8];
    let mut found = search(&model, &[prompt()], settings(), &allowed, |ids| !ids.contains(&7));
    for _ in 0..6 {
        let step = found.step().unwrap();
        assert!(step.found.ids.iter().all(|id| [4, 5, 6, 8].contains(id)), "{step:?}");
        assert_eq!(step.tried + step.unreadable, 60);
    }
    let error = search(&model, &[prompt()], settings(), &allowed, |_| false).step().unwrap_err().to_string();
    assert!(error.contains("none of 60") && error.contains("begin at another string"), "{error}");
}

#[test]
fn says_target_is_greedy_decoding() {
    let model = decoder();
    let mut prompt = prompt();
    let text = [&prompt.before[..], &[4, 4, 4], &prompt.behind].concat();
    let example = Example::new("e", Tokens::of_kind(text, TokenKind::User), Vec::new()).unwrap();
    let batch = Batch::new(vec![example], Device::Cpu).unwrap();
    let generation = advtrain::Generation { max_new_tokens: 3, ..Default::default() };
    prompt.target = model.generate(&batch, None, &generation).unwrap().remove(0);
    assert!(search(&model, &[prompt.clone()], settings(), &all(), |_| true).says_target().unwrap());
    prompt.target[2] = (prompt.target[2] + 1) % VOCABULARY;
    assert!(!search(&model, &[prompt], settings(), &all(), |_| true).says_target().unwrap());
}

#[test]
fn a_draft_spares_passes() {
    let model = decoder();
    let prompt = prompt();
    let draft = |candidates: &[Vec<i64>]| -> Result<Vec<f64>> {
        Ok(candidates.iter().map(|ids| mean(&losses_by_hand(&model, &prompt, ids))).collect())
    };
    let plain = search(&model, &[prompt.clone()], settings(), &all(), |_| true).step().unwrap();
    let with_draft = search(&model, &[prompt.clone()], settings(), &all(), |_| true);
    let mut with_draft = with_draft.with_draft(Exact(draft), ProbeSampling::default()).unwrap();
    let step = with_draft.step().unwrap();
    // The same model as the draft: it agrees, and the best is found with few passes.
    assert_eq!(step.found.ids, plain.found.ids);
    assert_relative_eq!(step.found.loss, plain.found.loss, max_relative = 1e-9);
    assert!(step.tried < 6, "{}", step.tried);
}

struct Exact<F>(F);

impl<F: FnMut(&[Vec<i64>]) -> Result<Vec<f64>>> advtrain::Draft for Exact<F> {
    fn losses(&mut self, candidates: &[Vec<i64>]) -> Result<Vec<f64>> {
        (self.0)(candidates)
    }
}

#[test]
fn costs_are_counted() {
    let model = decoder();
    let mut search = search(&model, &[prompt()], settings(), &all(), |_| true);
    let start = search.cost();
    // The text before, once; then a row of string, what is behind it, and target.
    assert_eq!((start.forward_passes, start.backward_passes, start.tokens), (1, 0, 3 + 7));
    search.step().unwrap();
    let cost = search.cost();
    assert_eq!((cost.forward_passes, cost.backward_passes, cost.tokens), (1 + 1 + 60, 1, 3 + 62 * 7));
}

#[test]
fn bad_settings_are_named() {
    let model = decoder();
    let error = |settings: TokenSearchSettings, start: &[Vec<i64>], allowed: &[i64]| {
        let random = ChaCha8Rng::seed_from_u64(0);
        let search = TokenSearch::new(&model, &[prompt()], start, allowed, settings, random, Box::new(|_| Ok(true)));
        search.err().unwrap().to_string()
    };
    let start = [vec![4]];
    for (field, settings) in [
        ("search.width", TokenSearchSettings { width: 0, ..settings() }),
        ("search.rows", TokenSearchSettings { rows: 0, ..settings() }),
        (
            "search.loss.mellowmax.sharpness",
            TokenSearchSettings { loss: SearchLoss::Mellowmax { sharpness: 0.0 }, ..settings() },
        ),
    ] {
        assert!(error(settings, &start, &all()).contains(field), "{field}");
    }
    assert!(error(settings(), &[], &all()).contains("at least one"));
    assert!(error(settings(), &[vec![1], vec![1, 2]], &all()).contains("[1, 2]"));
    assert!(error(settings(), &start, &[]).contains("allowed tokens"));
    assert!(error(settings(), &start, &[VOCABULARY]).contains("24"));
}

/// R2D2's seed (Mazeika et al. 2024): a string for each row, behind the user's text, that goes on being searched every time the row
/// comes. An attack of training like any other.
struct Strings {
    threat: ThreatModel,
    found: BTreeMap<String, Vec<i64>>,
}

impl Strings {
    fn step(&self, model: &dyn CausalLm, row: &Example, draws: Draws) -> Result<(SearchPrompt, Vec<i64>)> {
        let (ids, kinds) = (row.prompt().ids(), row.prompt().kinds());
        let end = kinds.iter().rposition(|kind| *kind == TokenKind::User).map_or(0, |last| last + 1);
        let target = row.continuation(ContinuationKind::Harmful).map(|one| one.tokens.ids().to_vec());
        let target = target.unwrap_or_default();
        let prompt = SearchPrompt { before: ids[..end].to_vec(), behind: ids[end..].to_vec(), target };
        let start = self.found.get(row.id()).cloned().unwrap_or(vec![4, 4]);
        let random = draws.generator(&format!("strings {}", row.id()), 0);
        let (settings, reads_back) = (settings(), Box::new(|_: &[i64]| Ok(true)));
        let prompts = std::slice::from_ref(&prompt);
        let mut search = TokenSearch::new(model, prompts, &[start], &all(), settings, random, reads_back)?;
        search.step()?;
        let best = search.best().ids.clone();
        Ok((prompt, best))
    }
}

impl EmbeddingAttack for Strings {
    fn threat(&self) -> &ThreatModel {
        &self.threat
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        Ok(vec![probe.zero()?])
    }

    fn reseed(&mut self, model: &dyn CausalLm, batch: &Batch, draws: Draws) -> Result<Option<Batch>> {
        let mut longer = batch.with_user_content(0, &user_content(&batch.examples()[0]))?;
        for (row, example) in batch.examples().iter().enumerate() {
            let (_, string) = self.step(model, example, draws)?;
            longer = longer.with_user_content(row, &[user_content(example), string.clone()].concat())?;
            self.found.insert(example.id().to_string(), string);
        }
        Ok(Some(longer))
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(self.found.iter().map(|(id, string)| (id.clone(), Tensor::from_slice(string))).collect())
    }

    fn restore(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        for (id, string) in state {
            self.found.insert(id, Vec::try_from(string)?);
        }
        Ok(())
    }
}

fn user_content(example: &Example) -> Vec<i64> {
    let prompt = example.prompt();
    let tokens = prompt.ids().iter().zip(prompt.kinds());
    tokens.filter(|(_, kind)| **kind == TokenKind::User).map(|(id, _)| *id).collect()
}

#[test]
fn an_attack_of_training_searches_strings() {
    let model = decoder();
    let rows = batch((0..3).map(robust).collect());
    let mut attack = Strings { threat: ThreatModel::default(), found: BTreeMap::new() };
    let loss = |batch: &Batch| numbers(&cross_entropy(&model, batch, ContinuationKind::Harmful, None));
    let mut before = loss(&rows);
    for _ in 0..2 {
        let outcome = attacked(&mut attack, &mut TargetCrossEntropy, AttackSettings::default(), &model, &rows).unwrap();
        let after = loss(outcome.batch.as_ref().unwrap());
        assert!(after.iter().sum::<f64>() < before.iter().sum::<f64>(), "{before:?} to {after:?}");
        before = after;
    }
    let mut other = Strings { threat: ThreatModel::default(), found: BTreeMap::new() };
    other.restore(attack.state().unwrap()).unwrap();
    assert_eq!(other.found, attack.found);
}
