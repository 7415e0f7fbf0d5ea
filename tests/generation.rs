//! Generation over a cache against generation without one, and against transformers.

mod common;

use std::collections::BTreeSet;

use advtrain::{
    Batch, CausalLm, Continuation, ContinuationKind, Decoder, Example, Generation, Perturbation, Place, Sampling, Site,
    TokenKind, Tokens,
    tch::{Device, Kind, Tensor},
};
use common::{MODELS, NoCache, fixture, load, some_ids};

fn prompt(id: &str, ids: Vec<i64>) -> Example {
    Example::new(id, Tokens::of_kind(ids, TokenKind::User), Vec::new()).unwrap()
}

/// Ragged prompts. Three are longer than the windows of the fixtures (5 and 6); with `NEW` tokens each, two stay below
/// phi3-longrope's switch (16), two cross it at different times, and one starts beyond it.
const LENGTHS: [usize; 5] = [1, 9, 3, 14, 18];
const NEW: usize = 10;

fn prompts() -> Vec<Example> {
    let one = |(at, len): (usize, &usize)| prompt(&format!("prompt {at}"), some_ids(at as u64 + 40, *len));
    LENGTHS.iter().enumerate().map(one).collect()
}

fn batch(examples: &[Example]) -> Batch {
    Batch::new(examples.to_vec(), Device::Cpu).unwrap()
}

/// Something on the first token of every prompt and the last of the fourth, at the embeddings and inside.
fn perturbation(model: &Decoder) -> Perturbation {
    let mut places: Vec<_> = (0..LENGTHS.len()).map(|row| Place { row, offset: 0 }).collect();
    places.push(Place { row: 3, offset: LENGTHS[3] - 1 });
    let values = |scale: f64| {
        let count = places.len() as i64 * model.hidden_size();
        let waves = Tensor::arange(count, (Kind::Double, Device::Cpu)) * 0.7;
        (waves.sin() * scale).view([places.len() as i64, model.hidden_size()])
    };
    let parts = vec![(Site::Embeddings, values(0.5)), (Site::Block(1), values(2.0))];
    Perturbation::new(places, parts).unwrap()
}

fn sampled(seed: u64) -> Generation {
    let sampling = Sampling { temperature: 1.3, top_p: 0.95, top_k: 60, seed };
    Generation { max_new_tokens: NEW, sampling: Some(sampling), ..Generation::default() }
}

fn greedy() -> Generation {
    Generation { max_new_tokens: NEW, ..Generation::default() }
}

/// The texts up to and with the first of these ids.
fn cut(texts: &[Vec<i64>], ends: &[i64]) -> Vec<Vec<i64>> {
    let end = |text: &Vec<i64>| text.iter().position(|id| ends.contains(id)).map_or(text.len(), |at| at + 1);
    texts.iter().map(|text| text[..end(text)].to_vec()).collect()
}

#[test]
fn a_cache_changes_no_token() {
    for name in MODELS {
        let model = load(name, Kind::Double);
        let perturbation = perturbation(&model);
        let all = batch(&prompts());
        let mut results = Vec::new();
        for perturbation in [None, Some(&perturbation)] {
            for settings in [greedy(), sampled(3)] {
                let plain = NoCache(&model).generate(&all, perturbation, &settings).unwrap();
                assert!(plain.iter().all(|text| text.len() == NEW));
                assert_eq!(model.generate(&all, perturbation, &settings).unwrap(), plain, "{name}, together");
                results.push(plain);
            }
        }
        for (row, example) in prompts().iter().enumerate() {
            let own = perturbation.restrict(&[row]).unwrap();
            let alone = batch(std::slice::from_ref(example));
            let found = model.generate(&alone, Some(&own), &sampled(3)).unwrap();
            assert_eq!(found, [results[3][row].clone()], "{name}, row {row} alone");
        }
        // Otherwise the perturbation was not seen, or nothing was drawn.
        assert_ne!(results[0], results[2], "{name}");
        assert_ne!(results[0], results[1], "{name}");
    }
}

#[test]
fn rows_stop_behind_their_own_end_id() {
    for name in MODELS {
        let model = load(name, Kind::Double);
        let perturbation = perturbation(&model);
        let all = batch(&prompts());
        let endless = model.generate(&all, Some(&perturbation), &sampled(8)).unwrap();
        let ends = vec![endless[0][4], endless[1][1], endless[3][7]];
        let expected = cut(&endless, &ends);
        let mut lengths: Vec<_> = expected.iter().map(Vec::len).collect();
        lengths.sort_unstable();
        lengths.dedup();
        assert!(lengths.len() >= 3, "{name}: {expected:?}");
        let settings = Generation { end_ids: ends, ..sampled(8) };
        assert_eq!(model.generate(&all, Some(&perturbation), &settings).unwrap(), expected, "{name}");
        assert_eq!(NoCache(&model).generate(&all, Some(&perturbation), &settings).unwrap(), expected, "{name}");
    }
}

#[test]
fn draws_depend_on_the_seed_and_the_rows_id_alone() {
    let model = load("llama", Kind::Double);
    let forward = prompts();
    let backward: Vec<Example> = forward.iter().rev().cloned().collect();
    let first = model.generate(&batch(&forward), None, &sampled(1)).unwrap();
    assert_eq!(model.generate(&batch(&forward), None, &sampled(1)).unwrap(), first);
    let mut reversed = model.generate(&batch(&backward), None, &sampled(1)).unwrap();
    reversed.reverse();
    assert_eq!(reversed, first);
    assert_ne!(model.generate(&batch(&forward), None, &sampled(2)).unwrap(), first);
    let twins = [prompt("a", some_ids(1, 6)), prompt("b", some_ids(1, 6)), prompt("a", some_ids(1, 6))];
    let said = model.generate(&batch(&twins), None, &sampled(1)).unwrap();
    assert_ne!(said[0], said[1]);
    assert_eq!(said[0], said[2]);
}

#[test]
fn sampling_with_one_choice_is_greedy() {
    let model = load("qwen2", Kind::Double);
    let all = batch(&prompts());
    let expected = model.generate(&all, None, &greedy()).unwrap();
    for sampling in [
        Sampling { top_k: 1, ..Sampling::default() },
        Sampling { top_p: 1e-9, ..Sampling::default() },
        Sampling { temperature: 1e-4, ..Sampling::default() },
    ] {
        let settings = Generation { sampling: Some(sampling.clone()), ..greedy() };
        assert_eq!(model.generate(&all, None, &settings).unwrap(), expected, "{sampling:?}");
    }
}

/// Also across longrope's switch, where ours equals transformers without its cache: see make_generated.py.
#[test]
fn greedy_texts_equal_transformers() {
    let text = std::fs::read_to_string(fixture("generated.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    for name in MODELS {
        let model = load(name, Kind::Float);
        let settings = Generation { max_new_tokens: 12, ..Generation::default() };
        let texts = |key: &str| -> Vec<Vec<i64>> { serde_json::from_value(json["models"][name][key].clone()).unwrap() };
        let (prompts, expected) = (texts("prompts"), texts("generated"));
        let different = |ids: &Vec<i64>| ids.iter().collect::<BTreeSet<_>>().len();
        assert!(prompts.len() >= 3 && expected.iter().all(|ids| ids.len() == 12 && different(ids) >= 3), "{name}");
        let all: Vec<Example> =
            prompts.into_iter().enumerate().map(|(at, ids)| prompt(&format!("{at}"), ids)).collect();
        assert_eq!(model.generate(&batch(&all), None, &settings).unwrap(), expected, "{name}");
    }
}

#[test]
fn what_cannot_be_continued_is_an_error() {
    let model = load("llama", Kind::Float);
    let continuation =
        Continuation { kind: ContinuationKind::Safe, tokens: Tokens::of_kind(vec![5], TokenKind::Target) };
    let answered = Example::new("answered", Tokens::of_kind(vec![4], TokenKind::User), vec![continuation]).unwrap();
    let error = model.generate(&batch(&[prompts().remove(0), answered]), None, &greedy()).unwrap_err().to_string();
    assert!(error.starts_with("example answered: has a continuation"), "{error}");
    let none = Generation { max_new_tokens: 0, ..Generation::default() };
    let error = model.generate(&batch(&prompts()), None, &none).unwrap_err().to_string();
    assert_eq!(error, "generation.max_new_tokens = 0: must be at least 1");
    for (id, allowed) in [(-1, "at least 0"), (96, "below the model's vocabulary, 96")] {
        let settings = Generation { end_ids: vec![2, id], ..greedy() };
        for model in [&model as &dyn CausalLm, &NoCache(&model)] {
            let error = model.generate(&batch(&prompts()), None, &settings).unwrap_err().to_string();
            assert_eq!(error, format!("generation.end_ids = {id}: must be {allowed}"));
        }
    }
    let hot = Generation { sampling: Some(Sampling { temperature: 0.0, ..Sampling::default() }), ..greedy() };
    let error = model.generate(&batch(&prompts()), None, &hot).unwrap_err().to_string();
    assert_eq!(error, "generation.sampling.temperature = 0: must be above 0 and finite");
}

/// A limit that no memory could hold is only a limit.
#[test]
fn a_cache_grows_with_the_text() {
    let model = load("llama", Kind::Float);
    let free = Generation { max_new_tokens: 90, ..Generation::default() };
    let said = model.generate(&batch(&prompts()), None, &free).unwrap();
    assert!(said == NoCache(&model).generate(&batch(&prompts()), None, &free).unwrap());
    // Each row ends at a token that it says: late enough for the cache to have grown.
    let end_ids: Vec<i64> = said.iter().map(|ids| ids[80]).collect();
    let bounded = Generation { max_new_tokens: usize::MAX, end_ids, ..Generation::default() };
    let ended = model.generate(&batch(&prompts()), None, &bounded).unwrap();
    assert!(ended.iter().zip(&said).all(|(ended, said)| ended.len() <= 81 && said.starts_with(ended)));
}

#[test]
fn numbers_that_overflow_are_no_answer() {
    let model = load("llama", Kind::Float);
    let broken = perturbation(&model).map(|values| Ok(values * f64::INFINITY)).unwrap();
    for sampling in [None, Some(Sampling::default())] {
        let settings = Generation { sampling, ..Generation::default() };
        for model in [&model as &dyn CausalLm, &NoCache(&model)] {
            let error = model.generate(&batch(&prompts()), Some(&broken), &settings).unwrap_err().to_string();
            assert!(error.contains("example prompt 0") && error.contains("not a finite number"), "{error}");
        }
    }
}
