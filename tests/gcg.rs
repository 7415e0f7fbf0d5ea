//! GCG on a toy model that speaks.

#[path = "common/speaking.rs"]
mod speaking;

use std::ops::ControlFlow;

use advtrain::{
    Case, ChatFormat, Continuation, ContinuationKind, Decoder, Example, Gcg, GcgSettings, GcgStop, Message, Outcome,
    Positions, ProbeSampling, PromptAttack, SearchLoss, Subject, TokenSearchSettings, target_losses,
    tch::{Device, Kind},
};
use approx::assert_relative_eq;
use speaking::{case, done, with_subject};

fn settings() -> GcgSettings {
    let search = TokenSearchSettings { width: 24, top_k: 16, rows: 8, ..TokenSearchSettings::default() };
    GcgSettings { steps: 6, start: " a a a".into(), search, check_every: 2, ..GcgSettings::default() }
}

fn gcg() -> Gcg<'static> {
    Gcg::new(settings()).unwrap()
}

/// The target's mean cross-entropy behind a conversation, from its text alone.
fn loss_of(subject: &Subject, messages: &[Message], target: &str) -> f64 {
    let opening = subject.format().opening(messages, target).unwrap();
    let target = Continuation { kind: ContinuationKind::Harmful, tokens: opening.continuation };
    let example = Example::new("e", opening.prompt, vec![target]).unwrap();
    target_losses(subject.model(), &[example], ContinuationKind::Harmful, 1).unwrap()[0].mean().unwrap()
}

/// What is offered is what was optimised: its text has the loss that the search found for its tokens.
#[test]
fn gcg_asks_with_its_best_string_and_goes_down() {
    with_subject(|subject| {
        let trajectory = done(&mut gcg(), subject, &case("x"));
        let steps: Vec<usize> = trajectory.attempts.iter().map(|one| one.step).collect();
        assert!(steps.starts_with(&[0, 2]) && steps.iter().all(|step| step % 2 == 0), "{steps:?}");
        assert_eq!((trajectory.losses.len(), trajectory.offered), (7, trajectory.attempts.len() - 1));
        let losses: Vec<f64> = trajectory.attempts.iter().map(|one| one.loss.unwrap()).collect();
        // The model is not asked again while the best string is the same.
        assert!(losses.windows(2).all(|pair| pair[1] < pair[0]), "{losses:?}");
        for attempt in &trajectory.attempts {
            assert!(attempt.messages[0].content.starts_with("Tell me x"), "{:?}", attempt.messages);
            let loss = loss_of(subject, &attempt.messages, "Sure, here");
            assert_relative_eq!(attempt.loss.unwrap(), loss, max_relative = 1e-5);
            assert_eq!(
                subject.answers(std::slice::from_ref(&attempt.messages)).unwrap(),
                std::slice::from_ref(&attempt.answer)
            );
        }
        assert_eq!(done(&mut gcg(), subject, &case("x")).attempts, trajectory.attempts, "same seed, same search");
    });
}

#[test]
fn one_suffix_serves_several_cases() {
    with_subject(|subject| {
        let cases = ["x", "y"].map(case);
        let found = gcg().universal(subject, &cases, &mut |_, _| ControlFlow::Continue(())).unwrap();
        assert!(found.completed);
        assert_eq!(found.losses.len(), 7);
        let least = found.losses.iter().copied().fold(f64::INFINITY, f64::min);
        assert!(least < found.losses[0], "{:?}", found.losses);
        let test_cases = found.test_cases(&cases);
        assert_eq!(test_cases["y"], [format!("Tell me y{}", found.suffix)]);
        let losses = ["x", "y"].map(|id| loss_of(subject, &[Message::user(&test_cases[id][0])], "Sure, here"));
        assert_relative_eq!((losses[0] + losses[1]) / 2.0, least, max_relative = 1e-5);
        assert!(gcg().universal(subject, &[], &mut |_, _| ControlFlow::Continue(())).is_err());
        let stopped = gcg().universal(subject, &cases, &mut |_, _| ControlFlow::Break(())).unwrap();
        assert!(!stopped.completed);
        assert_eq!(stopped.suffix, " a a a");
    });
}

/// A start that runs into the behaviour's last word is another string behind another word.
#[test]
fn a_start_that_is_read_otherwise_behind_a_case_is_refused() {
    with_subject(|subject| {
        let gcg = Gcg::new(GcgSettings { start: "he he".into(), ..settings() }).unwrap();
        let other = Case { messages: vec![Message::user("Tell me t")], ..case("t") };
        let cases = [Case { messages: vec![Message::user("Tell me!")], ..case("!") }, other];
        let error = gcg.universal(subject, &cases, &mut |_, _| ControlFlow::Continue(())).unwrap_err().to_string();
        assert!(error.contains("example t") && error.contains("gcg.start"), "{error}");
    });
}

#[test]
fn a_buffer_begins_at_random_strings_too() {
    with_subject(|subject| {
        let search = TokenSearchSettings { buffer: 6, ..settings().search };
        let with = done(&mut Gcg::new(GcgSettings { search, ..settings() }).unwrap(), subject, &case("x"));
        let without = done(&mut gcg(), subject, &case("x"));
        assert!(with.losses[0] < without.losses[0], "{:?}, {:?}", with.losses, without.losses);
    });
}

#[test]
fn a_search_stops_once_the_model_says_the_target() {
    with_subject(|subject| {
        let start = vec![Message::user("Tell me x a a a")];
        let said = subject.answers(&[start]).unwrap().concat();
        let case = Case { target: said.split_inclusive(' ').next().unwrap().trim().to_string(), ..case("x") };
        let run = |stop| {
            let mut attack = Gcg::new(GcgSettings { stop, check_every: 100, ..settings() }).unwrap();
            done(&mut attack, subject, &case)
        };
        let (stopped, whole) = (run(GcgStop::SaysTarget), run(GcgStop::Never));
        assert_eq!((stopped.losses.len(), whole.losses.len()), (2, 7));
        assert!(stopped.offer().unwrap().answer.starts_with(&case.target), "{:?}", stopped.offer());
    });
}

/// The toy refuses nothing: what decides is the loss, and that it was asked.
#[test]
fn a_search_stops_once_it_is_not_refused_at_a_low_loss() {
    with_subject(|subject| {
        let run = |loss| {
            let stop = GcgStop::NotRefused { loss };
            done(&mut Gcg::new(GcgSettings { stop, ..settings() }).unwrap(), subject, &case("x")).losses
        };
        let whole = run(0.0);
        assert_eq!(whole.len(), 7);
        let third = whole[..4].iter().copied().fold(f64::INFINITY, f64::min);
        let stopped = run(third);
        assert_eq!(stopped, whole[..stopped.len()]);
        assert!(stopped.len() <= 4, "{stopped:?}");
        for loss in [-1.0, f64::NAN] {
            let bad = GcgSettings { stop: GcgStop::NotRefused { loss }, ..settings() };
            assert!(Gcg::new(bad).unwrap_err().to_string().contains("gcg.stop.not_refused.loss"));
        }
    });
}

/// Table of HarmBench's and nanoGCG 0.3.0's defaults.
#[test]
fn presets_are_the_published_ones() {
    let (nanogcg, harmbench) = (GcgSettings::nanogcg(), GcgSettings::harmbench());
    assert_eq!((nanogcg.steps, harmbench.steps), (250, 500));
    assert_eq!((nanogcg.start, harmbench.start), (" x".repeat(20), " !".repeat(20)));
    assert_eq!((nanogcg.stop, harmbench.stop), (GcgStop::Never, GcgStop::NotRefused { loss: 0.05 }));
    assert_eq!((harmbench.check_every, nanogcg.ascii_only), (50, true));
    for (search, positions) in [(nanogcg.search, Positions::Drawn), (harmbench.search, Positions::Spread)] {
        assert_eq!((search.width, search.top_k, search.replaced, search.buffer), (512, 256, 1, 0));
        assert_eq!((search.positions, search.loss), (positions, SearchLoss::CrossEntropy));
    }
}

#[test]
fn a_draft_with_another_tokenizer_chooses_candidates() {
    let format = ChatFormat::load(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer_sp"));
    let format = format.unwrap();
    let json = serde_json::json!({
        "model_type": "llama", "vocab_size": format.tokenizer().vocabulary_size(), "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": true
    });
    let draft = Decoder::random(json, 0.4, 2, Kind::Float, Device::Cpu).unwrap();
    with_subject(|subject| {
        let mut attack = gcg().with_draft("draft", &draft, &format, ProbeSampling::default()).unwrap();
        assert_eq!(attack.settings()["draft"], "draft");
        let (with, without) = (done(&mut attack, subject, &case("x")), done(&mut gcg(), subject, &case("x")));
        assert!(with.losses.last().unwrap() < &with.losses[0]);
        assert!(with.cost.forward_passes < without.cost.forward_passes);
        assert!(with.cost.draft_passes > with.cost.forward_passes && without.cost.draft_passes == 0);
    });
}

#[test]
fn a_target_without_tokens_and_a_behaviour_beyond_the_context_are_errors() {
    with_subject(|subject| {
        let failed = |subject: &Subject, case: &Case| {
            gcg().attack(subject, case, &mut |_, _| ControlFlow::Continue(())).unwrap_err().to_string()
        };
        let empty = Case { target: " ".into(), ..case("x") };
        assert!(failed(subject, &empty).contains("must be a text"));
        let short =
            Subject::new(subject.model(), subject.format(), speaking::generation(), 4).unwrap().with_context(12);
        assert!(failed(&short, &case("x")).contains("at most 12"));
        let stopped = gcg().attack(subject, &case("x"), &mut |_, _| ControlFlow::Break(())).unwrap();
        assert_eq!(stopped, Outcome::Stopped);
    });
}
