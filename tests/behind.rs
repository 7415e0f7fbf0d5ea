//! A model that has read a text gives what it gives for the whole.

mod common;

use advtrain::{
    Adapter, Batch, CausalLm, Continuation,
    ContinuationKind::{Harmful, Safe},
    Example, Input, Last, LoraConfig, Pass, Perturbation, Place, Site, TokenKind, Tokens, TrainableLm,
    tch::{Device, Kind, Tensor},
};
use common::{MODELS, NoCache, assert_close, distance, load, some_ids};

fn tokens(ids: Vec<i64>, kind: TokenKind) -> Tokens {
    Tokens::of_kind(ids, kind)
}

/// Ragged rows, one with two continuations, each behind a text of its own.
fn rows(texts: [&[i64]; 3]) -> Batch {
    let answer = |kind, seed, len| Continuation { kind, tokens: tokens(some_ids(seed, len), TokenKind::Target) };
    let row = |at: usize, prompt: usize, answers: Vec<Continuation>| {
        let mut all = tokens(texts[at].to_vec(), TokenKind::Template);
        all.extend(&tokens(some_ids(at as u64 + 1, prompt), TokenKind::User));
        Example::new(format!("row {at}"), all, answers).unwrap()
    };
    let examples = vec![
        row(0, 3, vec![answer(Harmful, 11, 4), answer(Safe, 12, 2)]),
        row(1, 5, vec![answer(Harmful, 13, 3)]),
        row(2, 1, vec![answer(Harmful, 14, 1)]),
    ];
    Batch::new(examples, Device::Cpu).unwrap()
}

/// What of a pass over rows behind texts does not belong to the texts: log-probabilities of the targets, the gradient of a
/// weighted sum of them towards the prompts' embeddings, and the first block's output. Something is added inside the model.
/// `texts` tokens of each row are its text's; `read`: behind so many tokens of what the model has read it stands.
fn numbers(
    model: &dyn CausalLm,
    batch: &Batch,
    texts: [usize; 3],
    read: Option<[usize; 3]>,
    pass: Pass<'static>,
) -> [Tensor; 3] {
    let layout = batch.layout();
    let own = layout.rows().iter().zip(texts).flat_map(|(row, text)| row.tokens().skip(text).map(|at| at as i64));
    let own: Vec<i64> = own.collect();
    let prompts = layout.rows().iter().map(|row| row.prompt().len()).zip(texts).enumerate();
    let places: Vec<Place> =
        prompts.flat_map(|(row, (length, text))| (text..length).map(move |offset| Place { row, offset })).collect();
    let filled = |value: f64| {
        Tensor::full([places.len() as i64, model.hidden_size()], value, (model.master_kind(), Device::Cpu))
    };
    let moved = filled(0.0).set_requires_grad(true);
    let parts = vec![(Site::Embeddings, moved.shallow_clone()), (Site::Block(1), filled(0.3))];
    let perturbation = Perturbation::new(places.clone(), parts).unwrap();
    let mut input = Input::of_batch(model, batch, Some(&perturbation), Pass { taps: &[0], ..pass }).unwrap();
    if let Some(read) = read {
        input = input.behind(read.to_vec()).unwrap();
    }
    let hidden = model.hidden(&input).unwrap();
    let log_probs = [Harmful, Safe].map(|kind| {
        let targets = batch.targets(kind).unwrap();
        model.log_probs(&hidden.predicting(&targets).unwrap(), &targets.ids).unwrap()
    });
    let log_probs = Tensor::cat(&log_probs, 0);
    let weights = (Tensor::arange(log_probs.size()[0], (log_probs.kind(), Device::Cpu)) * 0.7).cos();
    let gradient = Tensor::run_backward(&[(&log_probs * weights).sum(None)], &[&moved], false, false).remove(0);
    [log_probs.detach(), gradient, hidden.tapped[0].detach().index_select(0, &Tensor::from_slice(&own))]
}

fn assert_same(what: &str, found: &[Tensor; 3], expected: &[Tensor; 3], tolerance: f64) {
    for (part, (found, expected)) in ["log-probs", "gradient", "tapped"].iter().zip(found.iter().zip(expected)) {
        assert_close(&format!("{what}: {part}"), found, expected, tolerance);
    }
}

const ALONE: [&[i64]; 3] = [&[]; 3];

fn asking(last: Last) -> Pass<'static> {
    Pass { last, ..Pass::default() }
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
                let whole = numbers(&model, &rows([&text; 3]), [length; 3], None, asking(Last::All));
                let plain = NoCache(&model);
                for (how, behind) in [("cached", model.behind(&text)), ("plain", plain.behind(&text))] {
                    let behind = behind.unwrap();
                    for last in [Last::All, Last::Predictors] {
                        let found = numbers(&*behind, &rows(ALONE), [0; 3], None, asking(last));
                        assert_same(
                            &format!("{name}, {kind:?}, {length} tokens, {how}, {last:?}"),
                            &found,
                            &whole,
                            tolerance,
                        );
                    }
                }
            }
        }
    }
}

/// Rows that begin at different places of the text; and a text that was read in two parts.
#[test]
fn rows_behind_parts_of_a_text_are_whole_rows() {
    for name in MODELS {
        let model = load(name, Kind::Double);
        for (length, read) in [(4, [2, 4, 0]), (12, [12, 5, 11]), (20, [20, 17, 19])] {
            let text = some_ids(9, length);
            let texts = read.map(|read| &text[..read]);
            let whole = numbers(&model, &rows(texts), read, None, asking(Last::All));
            let (first, second) = text.split_at(length / 2);
            let plain = NoCache(&model);
            for (how, behind) in [("cached", model.behind(first)), ("plain", plain.behind(first))] {
                let behind = behind.unwrap();
                let behind = behind.behind(second).unwrap();
                for last in [Last::All, Last::Predictors] {
                    let found = numbers(&*behind, &rows(ALONE), [0; 3], Some(read), asking(last));
                    assert_same(&format!("{name}, {read:?} of {length}, {how}, {last:?}"), &found, &whole, 1e-11);
                }
            }
        }
    }
}

/// The text's keys and values are the adapter's, without dropout: a pass that wants others must not be given them.
#[test]
fn a_pass_without_adapter_or_with_dropout_reads_the_text_anew() {
    let mut model = load("llama", Kind::Double);
    let lora = LoraConfig { rank: 4, alpha: 8.0, dropout: 0.5, ..LoraConfig::default() };
    model.add_lora(&lora, 1).unwrap();
    {
        let _guard = advtrain::tch::no_grad_guard();
        for mut parameter in model.parameters() {
            let _ = parameter.tensor.fill_(0.05);
        }
    }
    let text = some_ids(9, 6);
    let behind = model.behind(&text).unwrap();
    for pass in [Pass { adapter: Adapter::Off, ..Pass::default() }, Pass { dropout: true, ..Pass::default() }] {
        let run = |model: &dyn CausalLm, rows: &Batch, texts| {
            advtrain::tch::manual_seed(3);
            numbers(model, rows, texts, None, pass)
        };
        let whole = run(&model, &rows([&text; 3]), [6; 3]);
        let with_adapter = numbers(&model, &rows([&text; 3]), [6; 3], None, Pass::default());
        assert!(distance(&whole[0], &with_adapter[0]) > 1e-3);
        assert_same(&format!("{pass:?}"), &run(&*behind, &rows(ALONE), [0; 3]), &whole, 1e-11);
    }
}

#[test]
fn parts_that_the_text_lacks_are_refused() {
    let model = load("llama", Kind::Float);
    let rows = rows(ALONE);
    let run = |model: &dyn CausalLm, read: Vec<usize>| {
        model.hidden(&Input::of_batch(model, &rows, None, Pass::default())?.behind(read)?).map(|_| ())
    };
    let behind = model.behind(&[5, 6]).unwrap();
    for (model, read, named) in [
        (&*behind, vec![0, 3, 1], "at most 2"),
        (&*behind, vec![1], "expected 3"),
        (&model, vec![0; 3], "has read one"),
    ] {
        let error = run(model, read).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
}

#[test]
fn ids_that_the_vocabulary_lacks_are_refused() {
    let error = load("llama", Kind::Float).behind(&[3, -1]).err().unwrap().to_string();
    assert!(error.contains("-1"), "{error}");
}
