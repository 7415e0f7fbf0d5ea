//! The search for strings, on models small enough to try everything.

#[path = "common/toy.rs"]
mod toy;

use std::collections::BTreeMap;

use advtrain::{
    AttackSettings, Batch, CausalLm, Continuation, ContinuationKind, Draws, EmbeddingAttack, Example, Hidden, Input,
    Pass, Perturbation, Positions, Probe, ProbeSampling, Result, SearchLoss, SearchPrompt, TargetCrossEntropy,
    ThreatModel, TokenKind, TokenSearch, TokenSearchSettings, Tokens,
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
    reads_back: impl Fn(&[i64]) -> bool + Sync + 'a,
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
        let seen = std::sync::Mutex::new(Vec::new());
        let keep = |ids: &[i64]| {
            seen.lock().unwrap().push(ids.to_vec());
            true
        };
        search(&model, &[prompt()], settings, &all(), keep).step().unwrap();
        // One candidate for each position; where it changes nothing, the string's own token is the steepest.
        let own = seen.lock().unwrap().iter().map(|ids| ids[at]).find(|id| *id != string[at]);
        assert_eq!(own.unwrap_or(string[at]), steepest, "position {at}");
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
    for buffer in [0, 1] {
        let mut search = search(&model, &[prompt()], TokenSearchSettings { buffer, ..settings() }, &all(), |_| true);
        let start = search.best().loss;
        let losses: Vec<f64> = (0..12).map(|_| search.step().unwrap().found.loss).collect();
        let least = losses.iter().copied().fold(start, f64::min);
        assert_eq!(search.best().loss, least);
        assert!(least < 0.7 * start, "{buffer}: {start} to {least}");
    }
}

/// With a buffer the search goes on from the best of several beginnings.
#[test]
fn a_buffer_begins_at_the_best_of_several_strings() {
    let model = decoder();
    let starts: Vec<Vec<i64>> = (0..4).map(|at| vec![at, 2 * at, 3 * at + 1]).collect();
    let begin = |starts: &[Vec<i64>], buffer| {
        let (settings, random) = (TokenSearchSettings { buffer, ..settings() }, ChaCha8Rng::seed_from_u64(5));
        TokenSearch::new(&model, &[prompt()], starts, &all(), settings, random, Box::new(|_| Ok(true)))
    };
    let losses = starts.iter().map(|start| mean(&losses_by_hand(&model, &prompt(), start)));
    let least = losses.fold(f64::INFINITY, f64::min);
    let mut search = begin(&starts, 4).unwrap();
    assert_relative_eq!(search.best().loss, least, max_relative = 1e-9);
    let best = search.best().ids.clone();
    let gradient = search.gradients().unwrap().remove(0);
    let of_best = begin(&[best], 1).unwrap().gradients().unwrap().remove(0);
    assert!(gradient.allclose(&of_best, 1e-9, 1e-12, false));
    let error = begin(&starts, 3).unwrap_err().to_string();
    assert!(error.contains("1 to 3"), "{error}");
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
        assert_eq!(step.tried + step.unreadable + step.repeated, 60);
        assert!(step.unreadable > 0 && step.repeated > 0, "{step:?}");
    }
    let error = search(&model, &[prompt()], settings(), &allowed, |_| false).step().unwrap_err().to_string();
    assert!(error.contains("none of 12") && error.contains("begin at another string"), "{error}");
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
    let plain = search(&model, std::slice::from_ref(&prompt), settings(), &all(), |_| true).step().unwrap();
    let with_draft = search(&model, std::slice::from_ref(&prompt), settings(), &all(), |_| true);
    let mut with_draft = with_draft.with_draft(Exact(draft), ProbeSampling::default()).unwrap();
    let step = with_draft.step().unwrap();
    // The same model as the draft: it agrees, and the best is found with few passes.
    assert_eq!(step.found.ids, plain.found.ids);
    assert_relative_eq!(step.found.loss, plain.found.loss, max_relative = 1e-9);
    assert!(step.tried < 6, "{}", step.tried);
}

/// A draft that is wrong about everything: many of those that it holds best are tried.
#[test]
fn a_draft_that_disagrees_costs_passes() {
    let model = decoder();
    let draft = |candidates: &[Vec<i64>]| -> Result<Vec<f64>> {
        Ok(candidates.iter().map(|ids| -mean(&losses_by_hand(&model, &prompt(), ids))).collect())
    };
    let opposed = search(&model, &[prompt()], settings(), &all(), |_| true);
    let probe = ProbeSampling { sampled: 4, reduction: 2 };
    let step = opposed.with_draft(Exact(draft), probe).unwrap().step().unwrap();
    // Half of the distinct candidates by the draft's order, and those of the quarter that both judged.
    let distinct = 60 - step.repeated;
    assert!(step.tried >= distinct / 2 && step.tried <= distinct * 3 / 4, "{step:?}");
    let wrong = search(&model, &[prompt()], settings(), &all(), |_| true);
    let mut wrong = wrong.with_draft(Exact(|_: &[Vec<i64>]| Ok(vec![1.0])), ProbeSampling::default()).unwrap();
    let error = wrong.step().unwrap_err().to_string();
    assert!(error.contains("losses of a draft") && error.contains("found 1"), "{error}");
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
    let step = search.step().unwrap();
    let cost = search.cost();
    assert_eq!((cost.forward_passes, cost.backward_passes), (1 + 1 + step.tried, 1));
    // Candidates share what they begin with, which is read once: fewer tokens than whole rows, more than the rows without.
    let tried = step.tried;
    assert!((3 + 2 * 7 + 3 + tried * 5..3 + 2 * 7 + 3 + tried * 7).contains(&cost.tokens), "{cost:?}");
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
    let roomy = TokenSearchSettings { buffer: 2, ..settings() };
    assert!(error(settings(), &[], &all()).contains("at least one"));
    assert!(error(roomy, &[vec![1], vec![1, 2]], &all()).contains("[1, 2]"));
    assert!(error(settings(), &[vec![VOCABULARY]], &all()).contains("begins at: expected ids from 0 to 23, found 24"));
    assert!(error(settings(), &start, &[]).contains("allowed tokens"));
    assert!(error(settings(), &start, &[VOCABULARY]).contains("24"));
}

/// On a GPU an id beyond the table ends the process, so each is checked before it gets there.
#[test]
fn ids_that_the_model_lacks_are_named() {
    let model = decoder();
    let begin = |prompt: SearchPrompt| {
        let random = ChaCha8Rng::seed_from_u64(0);
        TokenSearch::new(&model, &[prompt], &[vec![4]], &all(), settings(), random, Box::new(|_| Ok(true)))
    };
    let beyond = vec![VOCABULARY];
    for (prompt, named) in [
        (SearchPrompt { before: beyond.clone(), ..prompt() }, "text read before"),
        (SearchPrompt { behind: beyond.clone(), ..prompt() }, "behind the string"),
        (SearchPrompt { target: beyond.clone(), ..prompt() }, "target"),
        (SearchPrompt { target: vec![], ..prompt() }, "target"),
    ] {
        let error = begin(prompt).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
    let mut search = begin(prompt()).unwrap();
    assert!(search.losses(&[beyond]).unwrap_err().to_string().contains("found 24"));
    assert!(search.losses(&[vec![]]).unwrap_err().to_string().contains("at least one token"));
}

/// A model with memory for so many rows.
struct Small<'a>(&'a dyn CausalLm, usize);

impl CausalLm for Small<'_> {
    fn layers(&self) -> usize {
        self.0.layers()
    }
    fn kind(&self) -> Kind {
        self.0.kind()
    }
    fn embedding(&self) -> &Tensor {
        self.0.embedding()
    }
    fn hidden(&self, input: &Input) -> Result<Hidden> {
        if input.layout().rows().len() > self.1 {
            return Err(advtrain::tch::TchError::Torch("CUDA out of memory. Tried to allocate".into()).into());
        }
        self.0.hidden(input)
    }
    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.0.logits(hidden)
    }
}

#[test]
fn where_memory_runs_out_fewer_candidates_are_computed_together() {
    let model = decoder();
    let settings = TokenSearchSettings { rows: 60, ..settings() };
    let run = |model: &dyn CausalLm| {
        search(model, &[prompt()], settings.clone(), &all(), |_| true).step().map(|step| step.found)
    };
    let (found, expected) = (run(&Small(&model, 9)).unwrap(), run(&model).unwrap());
    assert_eq!(found.ids, expected.ids);
    assert_relative_eq!(found.loss, expected.loss, max_relative = 1e-9);
    let (random, reads_back) = (ChaCha8Rng::seed_from_u64(5), Box::new(|_: &[i64]| Ok(true)));
    let none = Small(&model, 0);
    let error = TokenSearch::new(&none, &[prompt()], &[vec![4]], &all(), settings, random, reads_back).unwrap_err();
    assert!(error.to_string().contains("out of memory"), "{error}");
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
