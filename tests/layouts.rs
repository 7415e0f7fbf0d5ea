//! However rows are put together, the numbers are the same: hidden states, log-probabilities and input gradients.

mod common;

use std::collections::BTreeMap;

use advtrain::{
    Batch, CausalLm, Continuation,
    ContinuationKind::{self, Harmful, Safe},
    Decoder, Example, Input, Last, Layout, Pass, Side, TokenKind, Tokens,
    tch::{Device, Kind, Tensor},
};
use common::{MODELS, assert_close, load, some_ids};

const PRECISIONS: [(Kind, f64); 2] = [(Kind::Float, 1e-5), (Kind::Double, 1e-12)];

/// What a model makes of some tokens.
#[derive(Debug)]
struct Numbers {
    hidden: Tensor,
    gradient: Tensor,
}

/// What a model makes of a row.
#[derive(Debug)]
struct Row {
    prompt: Numbers,
    continuations: BTreeMap<ContinuationKind, (Numbers, Tensor)>,
}

fn example(seed: u64, prompt: usize, continuations: &[(ContinuationKind, usize)]) -> Example {
    let continuations = continuations.iter().map(|(kind, len)| {
        // A chat of several turns has tokens that are read and not predicted.
        let kinds = (0..*len).map(|at| if at == 1 && *len > 3 { TokenKind::Template } else { TokenKind::Target });
        let ids = some_ids(seed * 10 + *kind as u64 + 1, *len);
        Continuation { kind: *kind, tokens: Tokens::new(ids, kinds.collect()).unwrap() }
    });
    let prompt = Tokens::of_kind(some_ids(seed * 10, prompt), TokenKind::User);
    Example::new(format!("row {seed}"), prompt, continuations.collect()).unwrap()
}

/// Rows longer than the windows of the fixtures (5 and 6), all on one side of phi3-longrope's switch (16).
fn sets() -> [Vec<Example>; 2] {
    [
        vec![
            example(1, 5, &[(Harmful, 4), (Safe, 7)]),
            example(2, 9, &[(Harmful, 3), (Safe, 2)]),
            example(3, 3, &[(Safe, 8)]),
            example(4, 1, &[(Harmful, 1), (Safe, 10)]),
        ],
        vec![example(5, 17, &[(Harmful, 4), (Safe, 7)]), example(6, 20, &[(Harmful, 1), (Safe, 2)])],
    ]
}

/// The weight in the loss of the target `at` of a continuation.
fn weight(kind: ContinuationKind, at: usize) -> f64 {
    (kind as usize + 1) as f64 * 0.3 + (at * 7 % 5) as f64 * 0.2 - 0.5
}

/// Hidden states, and gradients of a weighted sum of log-probabilities, in packed order; and the log-probabilities.
/// `targets`: packed indices of predictor and target, and the weight.
fn pass(model: &Decoder, ids: &Tensor, layout: &Layout, targets: &[(usize, usize, f64)]) -> (Numbers, Tensor) {
    let index = |of: fn(&(usize, usize, f64)) -> usize| {
        Tensor::from_slice(&targets.iter().map(|target| of(target) as i64).collect::<Vec<_>>())
    };
    let embeddings = model.embed(ids).unwrap().detach().set_requires_grad(true);
    let input = Input::of_embeddings(embeddings.shallow_clone(), layout, Pass::default()).unwrap();
    let hidden = model.hidden(&input).unwrap().last;
    let predictors = hidden.index_select(0, &index(|target| target.0));
    let log_probs = model.log_probs(&predictors, &ids.index_select(0, &index(|target| target.1))).unwrap();
    let weights = Tensor::from_slice(&targets.iter().map(|target| target.2).collect::<Vec<_>>());
    let loss = (&log_probs * weights.to_kind(log_probs.kind())).sum(log_probs.kind());
    let gradient = Tensor::run_backward(&[loss], &[&embeddings], false, false).remove(0);
    (Numbers { hidden: hidden.detach(), gradient }, log_probs.detach())
}

fn evaluate(model: &Decoder, examples: &[Example]) -> Vec<Row> {
    let batch = Batch::new(examples.to_vec(), Device::Cpu).unwrap();
    let layout = batch.layout();
    let mut targets = Vec::new();
    for kind in [Harmful, Safe] {
        for target in layout.targets(kind) {
            let start = layout.rows()[target.row].continuation(kind).unwrap().start;
            targets.push((target.predictor, target.token, weight(kind, target.token - start)));
        }
    }
    let (numbers, log_probs) = pass(model, batch.ids(), layout, &targets);
    let narrow = |range: std::ops::Range<usize>| Numbers {
        hidden: numbers.hidden.narrow(0, range.start as i64, range.len() as i64),
        gradient: numbers.gradient.narrow(0, range.start as i64, range.len() as i64),
    };
    let rows = layout.rows().iter().map(|row| {
        let of_continuation = |(kind, range): &(ContinuationKind, std::ops::Range<usize>)| {
            let places: Vec<i64> =
                (0..targets.len()).filter(|at| range.contains(&targets[*at].1)).map(|at| at as i64).collect();
            (*kind, (narrow(range.clone()), log_probs.index_select(0, &Tensor::from_slice(&places))))
        };
        Row { prompt: narrow(row.prompt()), continuations: row.continuations().iter().map(of_continuation).collect() }
    });
    rows.collect()
}

fn assert_numbers(what: &str, found: &Numbers, expected: &Numbers, tolerance: f64) {
    assert_close(&format!("{what}: hidden"), &found.hidden, &expected.hidden, tolerance);
    assert_close(&format!("{what}: gradient"), &found.gradient, &expected.gradient, tolerance);
}

fn assert_rows(what: &str, found: &Row, expected: &Row, tolerance: f64) {
    assert_numbers(&format!("{what}, prompt"), &found.prompt, &expected.prompt, tolerance);
    assert_continuations(what, found, expected, tolerance);
}

/// Compares the continuations that `expected` has.
fn assert_continuations(what: &str, found: &Row, expected: &Row, tolerance: f64) {
    for (kind, (numbers, log_probs)) in &expected.continuations {
        let (found_numbers, found_log_probs) = &found.continuations[kind];
        assert_numbers(&format!("{what}, {kind:?}"), found_numbers, numbers, tolerance);
        assert_close(&format!("{what}, {kind:?}: log-probs"), found_log_probs, log_probs, tolerance);
    }
}

/// Runs `check` for every fixture, in both precisions, on both sets of rows.
fn everywhere(check: impl Fn(&str, &Decoder, &[Example], f64)) {
    for name in MODELS {
        for (kind, tolerance) in PRECISIONS {
            let model = load(name, kind);
            for (number, examples) in sets().iter().enumerate() {
                check(&format!("{name}, {kind:?}, set {number}"), &model, examples, tolerance);
            }
        }
    }
}

#[test]
fn a_prompt_shared_by_two_continuations_is_two_rows_with_one_each() {
    everywhere(|what, model, examples, tolerance| {
        let kinds = [Harmful, Safe];
        let separate: Vec<Example> = (examples.iter())
            .flat_map(|example| kinds.map(|kind| example.keep(&[kind])))
            .filter(|example| !example.continuations().is_empty())
            .collect();
        let mut separate = evaluate(model, &separate).into_iter();
        for (row, (example, shared)) in examples.iter().zip(evaluate(model, examples)).enumerate() {
            let mut sum: Option<Tensor> = None;
            for _ in example.continuations() {
                let own = separate.next().unwrap();
                let what = format!("{what}, row {row}");
                assert_continuations(&what, &shared, &own, tolerance);
                assert_close(&format!("{what}, prompt"), &shared.prompt.hidden, &own.prompt.hidden, tolerance);
                sum = Some(sum.map_or(own.prompt.gradient.shallow_clone(), |sum| sum + &own.prompt.gradient));
            }
            let what = format!("{what}, row {row}, prompt: sum of gradients");
            assert_close(&what, &shared.prompt.gradient, &sum.unwrap(), tolerance);
        }
        assert!(separate.next().is_none());
    });
}

#[test]
fn the_order_of_rows_and_their_company_change_nothing() {
    everywhere(|what, model, examples, tolerance| {
        let together = evaluate(model, examples);
        let reversed: Vec<Example> = examples.iter().rev().cloned().collect();
        for (row, found) in evaluate(model, &reversed).iter().rev().enumerate() {
            assert_rows(&format!("{what}, row {row} reversed"), found, &together[row], tolerance);
        }
        for (row, example) in examples.iter().enumerate() {
            let alone = evaluate(model, std::slice::from_ref(example)).remove(0);
            assert_rows(&format!("{what}, row {row} alone"), &alone, &together[row], tolerance);
        }
    });
}

#[test]
fn a_batch_padded_on_either_side_is_packed_into_the_same_numbers() {
    everywhere(|what, model, examples, tolerance| {
        let examples: Vec<Example> = examples.iter().map(|example| example.keep(&[Safe])).collect();
        let expected = evaluate(model, &examples);
        let batch = Batch::new(examples, Device::Cpu).unwrap();
        for side in [Side::Left, Side::Right] {
            let padded = batch.layout().to_padded(batch.ids(), side).unwrap();
            let mask = batch.layout().to_padded(&batch.ids().ones_like(), side).unwrap();
            let (layout, index) = Layout::from_padded(&mask).unwrap();
            // Padding is in there, so that the test is one.
            assert!(index.len() < padded.numel());
            let ids = padded.flatten(0, 1).index_select(0, &Tensor::from_slice(&index));
            let mut targets = Vec::new();
            for target in batch.layout().targets(Safe) {
                let start = batch.layout().rows()[target.row].continuation(Safe).unwrap().start;
                targets.push((target.predictor, target.token, weight(Safe, target.token - start)));
            }
            let (found, log_probs) = pass(model, &ids, &layout, &targets);
            let cat = |of: fn(&Numbers) -> &Tensor| {
                let parts: Vec<_> =
                    expected.iter().flat_map(|row| [of(&row.prompt), of(&row.continuations[&Safe].0)]).collect();
                Tensor::cat(&parts, 0)
            };
            let numbers = Numbers { hidden: cat(|one| &one.hidden), gradient: cat(|one| &one.gradient) };
            assert_numbers(&format!("{what}, {side:?}"), &found, &numbers, tolerance);
            let expected: Vec<_> = expected.iter().map(|row| &row.continuations[&Safe].1).collect();
            assert_close(&format!("{what}, {side:?}"), &log_probs, &Tensor::cat(&expected, 0), tolerance);
        }
    });
}

/// The prompt of a tree can be read with one set of rotary factors only: that of the row's longest text.
#[test]
fn a_row_across_the_switch_of_longrope_is_read_as_its_longest_text() {
    let model = load("phi3-longrope", Kind::Double);
    let row = example(7, 13, &[(Harmful, 2), (Safe, 6)]);
    let shared = evaluate(&model, std::slice::from_ref(&row)).remove(0);
    let long = evaluate(&model, &[row.keep(&[Safe])]).remove(0);
    let short = evaluate(&model, &[row.keep(&[Harmful])]).remove(0);
    assert_close("prompt", &shared.prompt.hidden, &long.prompt.hidden, 1e-12);
    assert_continuations("long", &shared, &long, 1e-12);
    assert!(common::distance(&shared.prompt.hidden, &short.prompt.hidden) > 1e-3);
}

#[test]
fn ids_outside_the_vocabulary_are_named() {
    let model = load("llama", Kind::Float);
    let tokens = |ids: &[i64], kind| Tokens::of_kind(ids.to_vec(), kind);
    for (prompt, answer, wrong) in
        [([3, 96], [4, 5], 96), ([3, 95], [4, -1], -1), ([3, 4], [4_294_967_297, 5], 4_294_967_297_i64)]
    {
        let answer = Continuation { kind: Safe, tokens: tokens(&answer, TokenKind::Target) };
        let wrong_one = Example::new("wrong", tokens(&prompt, TokenKind::User), vec![answer]).unwrap();
        let batch = Batch::new(vec![example(1, 5, &[(Safe, 2)]), wrong_one], Device::Cpu).unwrap();
        let error = Input::of_batch(&model, &batch, None, Pass::default()).unwrap_err().to_string();
        assert_eq!(error, format!("example wrong: token id {wrong}: the model's vocabulary has ids from 0 to 95"));
    }
    let edges = Example::new("edges", tokens(&[0, 95], TokenKind::User), Vec::new()).unwrap();
    let batch = Batch::new(vec![edges], Device::Cpu).unwrap();
    Input::of_batch(&model, &batch, None, Pass::default()).unwrap();
}

/// Leaving out of the last block what predicts nothing changes neither the states that are left nor the gradient; a tap on that
/// block keeps it whole.
#[test]
fn states_of_predictors_alone_are_those_of_a_whole_pass() {
    let equal = || vec![example(7, 6, &[(Harmful, 4)]), example(8, 6, &[(Harmful, 4)])];
    for name in MODELS {
        for (kind, tolerance) in PRECISIONS {
            let model = load(name, kind);
            for examples in sets().into_iter().chain([equal()]) {
                let batch = Batch::new(examples, Device::Cpu).unwrap();
                let run = |pass: Pass| {
                    let embeddings = model.embed(batch.ids()).unwrap().detach().set_requires_grad(true);
                    let input = Input::of_embeddings(embeddings.shallow_clone(), batch.layout(), pass).unwrap();
                    let hidden = model.hidden(&input).unwrap();
                    let of_kind = |kind| hidden.predicting(&batch.targets(kind).unwrap()).unwrap();
                    let states = Tensor::cat(&[of_kind(Harmful), of_kind(Safe)], 0);
                    let loss = (&states
                        * Tensor::arange(states.numel() as i64, (kind, Device::Cpu)).sin().view_as(&states))
                    .sum(kind);
                    let gradient = Tensor::run_backward(&[loss], &[&embeddings], false, false).remove(0);
                    (hidden, states.detach(), gradient)
                };
                let (whole, states, gradient) = run(Pass::default());
                let (partial, found, found_gradient) = run(Pass { last: Last::Predictors, ..Pass::default() });
                let predictors = batch.layout().predictors();
                assert_eq!((whole.last_of, partial.last.size()[0]), (None, predictors.len() as i64));
                assert!(predictors.len() < batch.layout().tokens());
                assert_eq!(partial.last_of, Some(predictors));
                assert_close(&format!("{name}: states"), &found, &states, tolerance);
                assert_close(&format!("{name}: gradient"), &found_gradient, &gradient, tolerance);
                let taps = [model.layers() - 1];
                let (tapped, ..) = run(Pass { last: Last::Predictors, taps: &taps, ..Pass::default() });
                assert_eq!(tapped.tapped[0].size(), whole.last.size());
            }
        }
    }
}
