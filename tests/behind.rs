//! A model that has read a text gives what it gives for the whole.

mod common;

use advtrain::{
    Batch, CausalLm, Continuation,
    ContinuationKind::{Harmful, Safe},
    Example, Input, Last, Pass, Perturbation, Place, Site, TokenKind, Tokens,
    tch::{Device, Kind, Tensor},
};
use common::{MODELS, NoCache, assert_close, load, some_ids};

fn tokens(ids: Vec<i64>, kind: TokenKind) -> Tokens {
    Tokens::of_kind(ids, kind)
}

/// Ragged rows, one with two continuations, behind a text of `text` tokens, or without it.
fn rows(text: &[i64]) -> Batch {
    let answer = |kind, seed, len| Continuation { kind, tokens: tokens(some_ids(seed, len), TokenKind::Target) };
    let row = |seed: u64, prompt: usize, answers: Vec<Continuation>| {
        let mut all = tokens(text.to_vec(), TokenKind::Template);
        all.extend(&tokens(some_ids(seed, prompt), TokenKind::User));
        Example::new(format!("row {seed}"), all, answers).unwrap()
    };
    let examples = vec![
        row(1, 3, vec![answer(Harmful, 11, 4), answer(Safe, 12, 2)]),
        row(2, 5, vec![answer(Harmful, 13, 3)]),
        row(3, 1, vec![answer(Harmful, 14, 1)]),
    ];
    Batch::new(examples, Device::Cpu).unwrap()
}

/// What of a pass over rows behind a text does not belong to the text: log-probabilities of the targets, the gradient of a
/// weighted sum of them towards the prompts' embeddings, and the first block's output. Something is added inside the model.
fn numbers(model: &dyn CausalLm, batch: &Batch, text: usize, last: Last) -> [Tensor; 3] {
    let own = |tokens: std::ops::Range<usize>| tokens.skip(text).map(|at| at as i64);
    let own: Vec<i64> = batch.layout().rows().iter().flat_map(|row| own(row.tokens())).collect();
    let prompts = batch.layout().rows().iter().map(|row| row.prompt().len()).enumerate();
    let places: Vec<Place> =
        prompts.flat_map(|(row, length)| (text..length).map(move |offset| Place { row, offset })).collect();
    let filled = |value: f64| {
        Tensor::full([places.len() as i64, model.hidden_size()], value, (model.master_kind(), Device::Cpu))
    };
    let moved = filled(0.0).set_requires_grad(true);
    let parts = vec![(Site::Embeddings, moved.shallow_clone()), (Site::Block(1), filled(0.3))];
    let perturbation = Perturbation::new(places.clone(), parts).unwrap();
    let pass = Pass { taps: &[0], last, ..Pass::default() };
    let hidden = model.hidden(&Input::of_batch(model, batch, Some(&perturbation), pass).unwrap()).unwrap();
    let log_probs = [Harmful, Safe].map(|kind| {
        let targets = batch.targets(kind).unwrap();
        model.log_probs(&hidden.predicting(&targets).unwrap(), &targets.ids).unwrap()
    });
    let log_probs = Tensor::cat(&log_probs, 0);
    let weights = (Tensor::arange(log_probs.size()[0], (log_probs.kind(), Device::Cpu)) * 0.7).cos();
    let gradient = Tensor::run_backward(&[(&log_probs * weights).sum(None)], &[&moved], false, false).remove(0);
    [log_probs.detach(), gradient, hidden.tapped[0].detach().index_select(0, &Tensor::from_slice(&own))]
}

/// Texts shorter and longer than the windows of the fixtures (5 and 6); with the longest row the last two lie on either
/// side of phi3-longrope's switch (16), the one before crosses it.
#[test]
fn rows_behind_a_text_are_whole_rows() {
    for name in MODELS {
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::Double, 1e-11)] {
            let model = load(name, kind);
            for length in [0, 1, 4, 12, 20] {
                let text = some_ids(9, length);
                let whole = numbers(&model, &rows(&text), length, Last::All);
                let plain = NoCache(&model);
                for (how, behind) in [("cached", model.behind(&text)), ("plain", plain.behind(&text))] {
                    for last in [Last::All, Last::Predictors] {
                        let found = numbers(&*behind.as_ref().unwrap().as_ref(), &rows(&[]), 0, last);
                        for (what, (found, whole)) in
                            ["log-probs", "gradient", "tapped"].iter().zip(found.iter().zip(&whole))
                        {
                            let what = format!("{name}, {kind:?}, {length} tokens, {how}, {last:?}: {what}");
                            assert_close(&what, found, whole, tolerance);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn ids_that_the_vocabulary_lacks_are_refused() {
    let error = load("llama", Kind::Float).behind(&[3, -1]).err().unwrap().to_string();
    assert!(error.contains("-1"), "{error}");
}
