//! Attacks of an evaluation on a toy model that speaks.

#[path = "common/speaking.rs"]
mod speaking;

use std::{cell::RefCell, ops::ControlFlow, path::Path, rc::Rc};

use advtrain::{
    Answered, AttackSettings, AutoDan, AutoDanSettings, Batch, Case, CausalLm, ChatFailure, ChatFormat, ChatModel,
    Continuation, ContinuationKind, Continuous, ContinuousSettings, Cost, Decoder, Direct, DirectSettings, Example,
    Generation, Harm, Iterate, Judge, Measurement, Message, Outcome, Pair, PairSettings, Perturbation, Pgd, Place,
    PromptAttack, Reply, ReplySettings, Result, ScoreJudge, Start, Subject, TokenKind, Tokens, Trajectory, Verdict,
    attack_examples, target_losses,
    tch::{Device, Kind, Tensor},
    to_tensor,
};
use approx::assert_relative_eq;
use speaking::{OtherLogits, case, done, format, generation, model, with_subject};

fn autodan() -> AutoDanSettings {
    AutoDanSettings { steps: 4, population: 8, check_every: 2, stop_when_not_refused: false, ..Default::default() }
}

#[test]
fn autodan_returns_the_best_of_all_generations() {
    with_subject(|subject| {
        for words_between in [0, 1] {
            let mut attack = AutoDan::new(AutoDanSettings { words_between, ..autodan() }).unwrap();
            let trajectory = done(&mut attack, subject, &case("x"));
            let least = trajectory.losses.iter().copied().fold(f64::INFINITY, f64::min);
            assert_eq!(trajectory.offer().unwrap().loss, Some(least));
            assert_eq!(trajectory.attempts[0].step, 0, "generation 0 is an attack");
            assert_eq!(trajectory.attempts[0].loss, Some(trajectory.losses[0]));
            assert!(trajectory.offer().unwrap().messages[0].content.ends_with("Tell me x"));
        }
    });
}

#[test]
fn autodan_draws_by_its_seed_and_its_variant() {
    with_subject(|subject| {
        let run = |settings: AutoDanSettings| {
            done(&mut AutoDan::new(AutoDanSettings { mutation: 0.5, ..settings }).unwrap(), subject, &case("x"))
        };
        let of = |trajectory: &Trajectory| (trajectory.attempts.clone(), trajectory.losses.clone());
        let first = run(autodan());
        assert_eq!(of(&run(autodan())), of(&first), "same seed, same search");
        assert_ne!(run(AutoDanSettings { seed: 1, ..autodan() }).losses, first.losses);
        let hierarchical = run(AutoDanSettings { words_between: 3, ..autodan() });
        // The first generation is of sentences in both, the second is not.
        assert_eq!(hierarchical.losses[..2], first.losses[..2]);
        assert_ne!(hierarchical.losses[2..], first.losses[2..]);
    });
}

#[test]
fn autodan_asks_when_it_is_told_to_and_not_twice_with_one_text() {
    with_subject(|subject| {
        let run = |settings| done(&mut AutoDan::new(settings).unwrap(), subject, &case("x"));
        let steps = |trajectory: &Trajectory| trajectory.attempts.iter().map(|one| one.step).collect::<Vec<_>>();
        let odd = run(AutoDanSettings { population: 7, check_every: 3, patience: 0, ..autodan() });
        assert_eq!((steps(&odd), odd.losses.len()), (vec![0, 3, 4], 5));
        assert!((8..=7 * 5).contains(&odd.cost.forward_passes), "{:?}", odd.cost);
        // Where nothing changes nothing gets better.
        let still = AutoDanSettings { crossover: 0.0, mutation: 0.0, check_every: 1, ..autodan() };
        let tired = run(AutoDanSettings { patience: 2, check_every: 9, ..still.clone() });
        assert_eq!((steps(&tired), tired.losses.len(), tired.cost.answers), (vec![0, 2], 3, 1));
        assert_eq!(tired.attempts[1].answer, tired.attempts[0].answer);
        let untiring = run(AutoDanSettings { patience: 0, ..still.clone() });
        assert_eq!((steps(&untiring), untiring.cost.answers), (vec![0, 1, 2, 3, 4], 1));
        assert_eq!(untiring.cost.forward_passes, 8, "a text is measured once");
        let early = run(AutoDanSettings { stop_when_not_refused: true, ..still });
        assert_eq!((steps(&early), early.losses.len()), (vec![0], 1), "noise refuses nothing");
    });
}

#[test]
fn elites_keep_what_was_found() {
    with_subject(|subject| {
        let falls = |elites| {
            let settings = AutoDanSettings { elites, crossover: 1.0, mutation: 1.0, steps: 8, ..autodan() };
            let losses = done(&mut AutoDan::new(settings).unwrap(), subject, &case("x")).losses;
            losses.windows(2).all(|pair| pair[1] <= pair[0])
        };
        // One of eight, though the share is less than that.
        assert!(falls(0.01) && !falls(0.0));
    });
}

#[test]
fn autodan_keeps_texts_that_its_rephraser_does_not_rephrase() {
    let settings = || AutoDanSettings { population: 4, steps: 2, crossover: 0.0, mutation: 1.0, ..autodan() };
    let refusing = replying(|_, _| Ok("I cannot help with that.".into()));
    let failing = replying(|_, _| Err(ChatFailure("gone".into())));
    let silent = replying(|_, _| Ok(" ".into()));
    let models: [Box<dyn ChatModel>; 3] = [Box::new(refusing), Box::new(failing), Box::new(silent)];
    with_subject(|subject| {
        for model in models {
            let attack = AutoDan::new(settings()).unwrap().with_prefixes("One. Two.").unwrap();
            let trajectory = done(&mut attack.with_rephraser(model), subject, &case("x"));
            assert_eq!(trajectory.offer().unwrap().messages[0].content, "One. Two. Tell me x");
            // Three texts to fill generation 0, then all but the one that stays.
            assert_eq!(trajectory.cost.replies, 3 + 2 * 3);
        }
        let attack = AutoDan::new(settings()).unwrap().with_prefixes("One. Two.").unwrap();
        let rephrased = done(&mut attack.with_rephraser(replying(|_, _| Ok("Three.".into()))), subject, &case("x"));
        assert!(rephrased.attempts.iter().any(|one| one.messages[0].content == "Three. Tell me x"), "{rephrased:?}");
        let mut attack = AutoDan::new(settings()).unwrap().with_rephraser(Miscounting);
        attack = attack.with_prefixes("One.").unwrap();
        assert!(error(&mut attack, subject, &case("x")).contains(r#"model "miscounting": expected 3, found 0"#));
    });
}

#[test]
fn texts_that_are_too_long_die_out() {
    let (model, format) = (model(), format());
    let long = "Word. ".repeat(80);
    let request = format.prompt(&[Message::user(format!("{long}Tell me x"))]).unwrap().len();
    let subject = Subject::new(&model, &format, generation(), 4).unwrap().with_context(request);
    let settings = AutoDanSettings { population: 2, crossover: 0.0, mutation: 0.0, ..autodan() };
    let attack = |text: &str| AutoDan::new(settings.clone()).unwrap().with_prefixes(text).unwrap();
    let trajectory = done(&mut attack(&format!("Short. Text.\n\n{long}")), &subject, &case("x"));
    assert_eq!(trajectory.offer().unwrap().messages[0].content, "Short. Text. Tell me x");
    assert_eq!(trajectory.cost.forward_passes, 1, "the long text is never read");
    let why = error(&mut attack(&long), &subject, &case("x"));
    assert!(
        why.contains("none of 2 texts can stand before its request") && why.contains(&format!("at most {request}")),
        "{why}"
    );
}

#[test]
fn prefixes_can_be_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("prefixes.txt");
    let settings = AutoDanSettings { prefixes: Some(path.clone()), ..autodan() };
    let missing = AutoDan::new(settings.clone()).unwrap_err().to_string();
    assert!(missing.contains("prefixes.txt"), "{missing}");
    std::fs::write(&path, " \n\n").unwrap();
    let empty = AutoDan::new(settings.clone()).unwrap_err().to_string();
    assert!(empty.contains("prefixes.txt") && empty.contains("at least one text"), "{empty}");
    std::fs::write(&path, "One. Two.\n\nThree. Four.\n").unwrap();
    let attack = AutoDan::new(settings).unwrap();
    let shipped = AutoDan::new(autodan()).unwrap();
    assert_ne!(attack.settings(), shipped.settings());
    // What the file holds counts, and not its name.
    assert_eq!(attack.settings(), shipped.with_prefixes("One. Two.\n\nThree. Four.").unwrap().settings());
    let other = AutoDan::new(autodan()).unwrap().with_synonyms(advtrain::Synonyms::parse("a b"));
    assert_ne!(other.settings(), AutoDan::new(autodan()).unwrap().settings());
}

#[test]
fn a_stop_is_seen_before_anyone_is_asked() {
    with_subject(|subject| {
        let asked = Rc::new(RefCell::new(0));
        let model = |reply: &'static str| {
            let asked = asked.clone();
            replying(move |_, _| {
                *asked.borrow_mut() += 1;
                Ok(reply.into())
            })
        };
        let settings = AutoDanSettings { population: 64, ..autodan() };
        let mut genetic = AutoDan::new(settings).unwrap().with_rephraser(model("Other."));
        let mut pair = Pair::new(PairSettings::default(), model("no JSON"), scores([1.0])).unwrap();
        for (attack, most) in [(&mut genetic as &mut dyn PromptAttack, 4), (&mut pair, 4)] {
            *asked.borrow_mut() = 0;
            assert_eq!(
                attack.attack(subject, &case("x"), &mut |_, _| ControlFlow::Break(())).unwrap(),
                Outcome::Stopped
            );
            assert_eq!(*asked.borrow(), 0);
            // Then between calls: four texts are a call, as many as the subject computes together.
            let mut calls = 0;
            let mut second = |_, _| {
                calls += 1;
                if calls > 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            assert_eq!(attack.attack(subject, &case("x"), &mut second).unwrap(), Outcome::Stopped);
            assert!((1..=2 * most).contains(&*asked.borrow()), "{}", asked.borrow());
        }
    });
}

#[test]
fn direct_draws_answers_and_gives_beginnings() {
    with_subject(|subject| {
        let mut direct = Direct::new(DirectSettings { samples: 3, ..Default::default() }).unwrap();
        let answers: Vec<String> =
            done(&mut direct, subject, &case("x")).attempts.into_iter().map(|one| one.answer).collect();
        assert_eq!(answers[0], subject.answers(&[case("x").messages]).unwrap()[0]);
        assert_eq!(answers.len(), 3);
        assert_ne!(answers[1], answers[2]);
    });
}

/// A model with the tokenizer of the SentencePiece kind, whose decoder drops the space before the first word.
fn sentence_piece(seed: u64) -> (Decoder, ChatFormat) {
    let format = ChatFormat::load(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer_sp")).unwrap();
    let json = serde_json::json!({
        "model_type": "llama", "vocab_size": format.tokenizer().vocabulary_size(), "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": false
    });
    (Decoder::random(json, 0.4, seed, Kind::Float, Device::Cpu).unwrap(), format)
}

/// What a model says behind the beginning of an answer, in token ids.
fn said_behind(subject: &Subject, case: &Case, given: &str, most: usize) -> (Vec<i64>, Vec<i64>) {
    let opening = subject.format().opening(&case.messages, given).unwrap();
    let given = opening.continuation.ids().to_vec();
    let mut prompt = Tokens::of_kind(opening.prompt.ids().to_vec(), TokenKind::Template);
    prompt.extend(&Tokens::of_kind(given.clone(), TokenKind::Template));
    let prompts = Batch::new(vec![Example::new("x", prompt, Vec::new()).unwrap()], Device::Cpu).unwrap();
    let settings = Generation { max_new_tokens: most - given.len(), ..subject.generation().clone() };
    (given, subject.model().generate(&prompts, None, &settings).unwrap().remove(0))
}

#[test]
fn a_given_beginning_is_read_and_goes_on_with_its_spaces() {
    let case = Case { target: "Sure, here\nis how to make it".into(), ..case("x") };
    let given = "Sure, here\nis how to";
    let most = 40;
    let mut with_space = 0;
    for seed in 0..40 {
        let (model, format) = sentence_piece(seed);
        let generation = Generation { max_new_tokens: most, ..generation() };
        let subject = Subject::new(&model, &format, generation, 4).unwrap();
        let mut prefill = Direct::new(DirectSettings { prefill: 5, ..Default::default() }).unwrap();
        let answer = done(&mut prefill, &subject, &case).attempts.remove(0).answer;
        let (ids, said) = said_behind(&subject, &case, given, most);
        let tokenizer = format.tokenizer();
        assert_eq!(answer, tokenizer.decode(&[ids, said.clone()].concat(), true).unwrap().trim_start());
        let behind = answer.strip_prefix(given).unwrap();
        if tokenizer.token_of(said[0]).unwrap().starts_with('\u{2581}') {
            with_space += 1;
            assert!(behind.starts_with(' '), "{answer:?}");
        }
    }
    assert!(with_space > 0, "some model begins with a word");
}

#[test]
fn a_beginning_that_the_model_adds_nothing_to_is_no_answer() {
    let case = Case { target: "Sure, here is how".into(), ..case("x") };
    let (model, format) = sentence_piece(0);
    let end_ids = format.end_ids();
    let end = end_ids[0];
    let silent = OtherLogits(&model, |logits: Tensor| {
        let _ = logits.select(-1, end).fill_(1e9);
        logits
    });
    let generation = Generation { end_ids, ..generation() };
    let mut prefill = Direct::new(DirectSettings { prefill: 2, ..Default::default() }).unwrap();
    let mut answer = |model: &dyn CausalLm| {
        let subject = Subject::new(model, &format, generation.clone(), 4).unwrap();
        done(&mut prefill, &subject, &case).attempts.remove(0).answer
    };
    assert_eq!(answer(&silent), "");
    assert!(answer(&model).starts_with("Sure, here"));
}

#[test]
fn every_attack_says_what_a_case_lacks() {
    let (model, format) = (model(), format());
    let free = Subject::new(&model, &format, generation(), 4).unwrap();
    let bound = Subject::new(&model, &format, generation(), 4).unwrap().with_context(10);
    let prefill = DirectSettings { prefill: 2, ..Default::default() };
    let pair = || Pair::new(PairSettings::default(), scripted(&["no"]), scores([1.0])).unwrap();
    let attacks: [(bool, Box<dyn PromptAttack>); 4] = [
        (false, Box::new(Direct::new(prefill).unwrap())),
        (false, Box::new(Continuous::new(continuous(true, None)).unwrap())),
        (true, Box::new(AutoDan::new(autodan()).unwrap())),
        (true, Box::new(pair())),
    ];
    for (changes_the_request, mut attack) in attacks {
        let name = attack.name();
        let why = error(&mut *attack, &free, &Case { target: " ".into(), ..case("x") });
        assert!(why.contains("example x") && why.contains("target"), "{name}: {why}");
        let why = error(&mut *attack, &bound, &case("x"));
        assert!(why.contains("plain request of x") && why.contains("at most 10"), "{name}: {why}");
        if changes_the_request {
            let answered = vec![Message::user("a"), Message::assistant("b")];
            let why = error(&mut *attack, &free, &Case { messages: answered, ..case("x") });
            assert!(why.contains("example x") && why.contains("one of the role assistant"), "{name}: {why}");
        }
    }
    // Without a beginning to give, the plain request needs no target.
    let mut direct = Direct::new(DirectSettings::default()).unwrap();
    assert!(done(&mut direct, &free, &Case { target: String::new(), ..case("x") }).offer().is_some());
}

fn continuous(bounded: bool, suffix: Option<&str>) -> ContinuousSettings {
    let mut attack = Pgd { steps: 20, ..Pgd::default() };
    attack.threat.bounded = bounded;
    let around = AttackSettings { iterate: Iterate::Best, ..Default::default() };
    ContinuousSettings { name: "embedding".into(), attack, around, suffix: suffix.map(str::to_string), seed: 0 }
}

/// The example that an embedding attack on the prompt of a case attacks.
fn example(subject: &Subject, messages: &[Message], case: &Case) -> Example {
    let opening = subject.format().opening(messages, &case.target).unwrap();
    let target = Continuation { kind: ContinuationKind::Harmful, tokens: opening.continuation };
    Example::new(&case.id, subject.format().prompt(messages).unwrap(), vec![target]).unwrap()
}

#[test]
fn the_embedding_attack_breaks_the_prompt_and_the_suffix() {
    with_subject(|subject| {
        for suffix in [None, Some(" a a a")] {
            let run = |bounded| {
                let mut attack = Continuous::new(continuous(bounded, suffix)).unwrap();
                done(&mut attack, subject, &case("x"))
            };
            let (bounded, unbounded) = (run(true), run(false));
            let messages = [Message::user(format!("Tell me x{}", suffix.unwrap_or_default()))];
            assert_eq!(bounded.attempts[0].messages, messages);
            let plain = [example(subject, &messages, &case("x"))];
            let clean = target_losses(subject.model(), &plain, ContinuationKind::Harmful, 1).unwrap();
            let loss = |trajectory: &Trajectory| trajectory.attempts[0].loss.unwrap();
            let losses = [clean[0].mean().unwrap(), loss(&bounded), loss(&unbounded)];
            assert!(losses[0] > losses[1] && losses[1] >= losses[2], "{losses:?}");
            assert_eq!(bounded.losses, losses[..2], "before and after");
            // Twenty gradients, the last iterate, the losses before and after.
            assert_eq!((bounded.cost.backward_passes, bounded.cost.forward_passes), (20, 20 + 1 + 2));
        }
    });
}

#[test]
fn the_answer_under_an_embedding_attack_is_that_of_the_perturbed_prompt() {
    with_subject(|subject| {
        let drawn = Generation { sampling: Some(advtrain::Sampling::default()), ..generation() };
        let sampling = Subject::new(subject.model(), subject.format(), drawn, 4).unwrap();
        let settings = continuous(false, None);
        let answers = [subject, &sampling].map(|subject| {
            done(&mut Continuous::new(settings.clone()).unwrap(), subject, &case("x")).attempts.remove(0).answer
        });
        assert_eq!(answers[0], answers[1], "it is greedy, however the subject answers");

        let example = example(subject, &case("x").messages, &case("x"));
        let measurement =
            Measurement { attack: settings.around, seed: 0, rows: 1, generation: None, keep_perturbations: true };
        let mut attack = settings.attack;
        let found =
            attack_examples(subject.model(), std::slice::from_ref(&example), &mut attack, &measurement).unwrap();
        let (site, values) = &found.rows[0].perturbation[0];
        let places = (0..example.prompt().len()).map(|offset| Place { row: 0, offset }).collect();
        let values = to_tensor(values).unwrap().to_kind(Kind::Float);
        let perturbation = Perturbation::new(places, vec![(*site, values)]).unwrap();
        let prompt = Batch::new(vec![example.keep(&[])], Device::Cpu).unwrap();
        let said = subject.model().generate(&prompt, Some(&perturbation), subject.generation()).unwrap();
        assert_eq!(subject.format().tokenizer().decode(&said[0], true).unwrap(), answers[0]);
        assert_ne!(answers[0], subject.answers(&[case("x").messages]).unwrap()[0]);
    });
}

#[test]
fn cases_are_attacked_together_as_each_alone() {
    let targets = ["Sure, here", "Sure, here is a much longer one", "No"];
    let cases: Vec<Case> = ["x", "the second", "y"]
        .iter()
        .zip(targets)
        .map(|(id, target)| Case { target: target.into(), ..case(id) })
        .collect();
    let around = AttackSettings { start: Start::Uniform, restarts: 2, iterate: Iterate::Best, ..Default::default() };
    let embedding = |suffix| {
        let settings = continuous(true, suffix);
        let attack = Pgd { steps: 2, ..Pgd::measuring(settings.attack.threat.clone()) };
        Box::new(Continuous::new(ContinuousSettings { attack, around: around.clone(), ..settings }).unwrap())
    };
    let direct = |settings| Box::new(Direct::new(settings).unwrap());
    let attacks: [Box<dyn PromptAttack>; 4] = [
        direct(DirectSettings { samples: 2, ..Default::default() }),
        direct(DirectSettings { prefill: 4, samples: 2, ..Default::default() }),
        embedding(None),
        embedding(Some(" a a")),
    ];
    with_subject(|subject| {
        for mut attack in attacks {
            assert_eq!(attack.at_once(subject), 4);
            let together = attack.attack_together(subject, &cases, &mut |_, _| ControlFlow::Continue(())).unwrap();
            assert_eq!(together.len(), cases.len());
            for (case, outcome) in cases.iter().zip(together) {
                let Outcome::Done(together) = outcome else { panic!("nothing stops it") };
                let alone = done(&mut *attack, subject, case);
                let said = |found: &Trajectory| -> Vec<(usize, Vec<Message>, String)> {
                    found.attempts.iter().map(|one| (one.stream, one.messages.clone(), one.answer.clone())).collect()
                };
                assert_eq!(said(&together), said(&alone), "{} on {}", attack.name(), case.id);
                assert_eq!(together.losses.len(), alone.losses.len());
                for (ours, theirs) in together.losses.iter().zip(&alone.losses) {
                    assert_relative_eq!(ours, theirs, max_relative = 1e-4);
                }
                let counted = |found: &Trajectory| Cost { seconds: 0.0, ..found.cost };
                assert_eq!(counted(&together), counted(&alone));
            }
            let stopped = attack.attack_together(subject, &cases, &mut |_, _| ControlFlow::Break(())).unwrap();
            assert_eq!(stopped, vec![Outcome::Stopped; 3]);
        }
    });
}

#[test]
fn an_embedding_attack_is_checked_whole() {
    let good = continuous(true, None);
    let pgd = Pgd { steps: 0, ..good.attack.clone() };
    let warm = AttackSettings { warm_start: true, ..Default::default() };
    let alike = AttackSettings { restarts: 2, start: Start::Zero, ..Default::default() };
    for (field, settings) in [
        ("embedding.name", ContinuousSettings { name: " ".into(), ..good.clone() }),
        ("embedding.attack.steps", ContinuousSettings { attack: pgd, ..good.clone() }),
        ("embedding.around.warm_start", ContinuousSettings { around: warm, ..good.clone() }),
        ("embedding.around.restarts", ContinuousSettings { around: alike, ..good.clone() }),
        ("embedding.suffix", ContinuousSettings { suffix: Some(" ".into()), ..good }),
    ] {
        let why = Continuous::new(settings).unwrap_err().to_string();
        assert!(why.starts_with(field), "{why}");
    }
}

/// Replies from a list, by turns.
struct Scripted(Vec<&'static str>, usize, Vec<Vec<Message>>);

impl ChatModel for Scripted {
    fn name(&self) -> String {
        "scripted".into()
    }

    fn replies(&mut self, conversations: &[Vec<Message>], _: &ReplySettings) -> Result<Vec<Reply>> {
        self.2.extend(conversations.iter().cloned());
        let reply = |_: &Vec<Message>| {
            self.1 += 1;
            Ok(self.0[(self.1 - 1) % self.0.len()].to_string())
        };
        Ok(conversations.iter().map(reply).collect())
    }
}

fn scripted(replies: &[&'static str]) -> Scripted {
    Scripted(replies.to_vec(), 0, Vec::new())
}

/// Writes a prompt only where it is told to argue, which is the second stream.
struct Arguing;

impl ChatModel for Arguing {
    fn name(&self) -> String {
        "arguing".into()
    }

    fn replies(&mut self, conversations: &[Vec<Message>], _: &ReplySettings) -> Result<Vec<Reply>> {
        let reply = |messages: &Vec<Message>| {
            let turn = messages.len() / 2;
            let argues = messages[0].content.contains("Argue");
            Ok(if argues { format!(r#"{{"improvement": "", "prompt": "ask {turn}"}}"#) } else { "no".into() })
        };
        Ok(conversations.iter().map(reply).collect())
    }
}

#[test]
fn pair_keeps_streams_apart_from_what_failed() {
    with_subject(|subject| {
        let judge = ScoreJudge::new(scripted(&["Rating: [[7]]", "Rating: [[3]]"]), 10.0).unwrap();
        let settings = PairSettings { streams: 2, steps: 3, retries: 1, ..PairSettings::default() };
        let trajectory = done(&mut Pair::new(settings, Arguing, judge).unwrap(), subject, &case("x"));
        let tried: Vec<(usize, usize, &str)> =
            trajectory.attempts.iter().map(|one| (one.step, one.stream, one.messages[0].content.as_str())).collect();
        // The attacker sees what it said and was told before.
        assert_eq!(tried, [(0, 1, "ask 0"), (1, 1, "ask 1"), (2, 1, "ask 2")]);
        assert_eq!(trajectory.offered, 0, "the first was rated highest");
        // Per step the second stream once, the first twice, and three verdicts.
        assert_eq!((trajectory.cost.replies, trajectory.cost.answers), (3 * 3 + 3, 3));
    });
}

#[test]
fn pair_without_any_prompt_says_why() {
    with_subject(|subject| {
        let run = |reply: fn() -> Reply| {
            let settings = PairSettings { streams: 2, steps: 1, retries: 1, ..PairSettings::default() };
            let mut attack = Pair::new(settings, replying(move |_, _| reply()), scores([1.0])).unwrap();
            error(&mut attack, subject, &case("x"))
        };
        let malformed = run(|| Ok("no JSON here".into()));
        assert!(malformed.contains("none in 4 replies") && malformed.contains("no JSON here"), "{malformed}");
        // Asking again would not help.
        let failed = run(|| Err(ChatFailure("the line is dead".into())));
        assert!(failed.contains("none in 2 replies") && failed.contains("the line is dead"), "{failed}");
    });
}

/// Replies with what a function makes of a conversation.
struct Replying<F> {
    marks: Vec<String>,
    reply: F,
}

fn replying<F: FnMut(&[Message], &ReplySettings) -> Reply>(reply: F) -> Replying<F> {
    Replying { marks: Vec::new(), reply }
}

impl<F: FnMut(&[Message], &ReplySettings) -> Reply> ChatModel for Replying<F> {
    fn name(&self) -> String {
        "replying".into()
    }

    fn marks(&self) -> Vec<String> {
        self.marks.clone()
    }

    fn replies(&mut self, conversations: &[Vec<Message>], settings: &ReplySettings) -> Result<Vec<Reply>> {
        Ok(conversations.iter().map(|messages| (self.reply)(messages, settings)).collect())
    }
}

/// An attacker's reply with this prompt.
fn prompt(text: impl Into<String>) -> Reply {
    Ok(serde_json::json!({ "improvement": "none", "prompt": text.into() }).to_string())
}

/// Gives no reply and no verdict at all.
struct Miscounting;

impl ChatModel for Miscounting {
    fn name(&self) -> String {
        "miscounting".into()
    }

    fn replies(&mut self, _: &[Vec<Message>], _: &ReplySettings) -> Result<Vec<Reply>> {
        Ok(Vec::new())
    }
}

impl Judge for Miscounting {
    fn name(&self) -> String {
        "miscounting".into()
    }

    fn judge(&mut self, _: &[Answered]) -> Result<Vec<Verdict>> {
        Ok(Vec::new())
    }
}

/// Gives what a function makes of an answer.
struct Judging<F>(F);

impl<F: FnMut(&Answered) -> Verdict> Judge for Judging<F> {
    fn name(&self) -> String {
        "judging".into()
    }

    fn judge(&mut self, answers: &[Answered]) -> Result<Vec<Verdict>> {
        Ok(answers.iter().map(&mut self.0).collect())
    }
}

/// Gives these scores, by turns.
fn scores<const N: usize>(scores: [f64; N]) -> Judging<impl FnMut(&Answered) -> Verdict> {
    let mut at = 0;
    Judging(move |_: &Answered| {
        at += 1;
        Verdict { score: Some(scores[(at - 1) % N]), ..Verdict::new(Harm::NotJudged, "") }
    })
}

fn error(attack: &mut dyn PromptAttack, subject: &Subject, case: &Case) -> String {
    attack.attack(subject, case, &mut |_, _| ControlFlow::Continue(())).unwrap_err().to_string()
}

#[test]
fn pair_stops_at_the_score_that_it_is_given() {
    with_subject(|subject| {
        let run = |stop_score| {
            let settings = PairSettings { streams: 2, steps: 3, stop_score, ..PairSettings::default() };
            let judge = scores([3.0, 4.0, 10.0, 2.0, 1.0, 1.0]);
            done(&mut Pair::new(settings, replying(|_, _| prompt("ask")), judge).unwrap(), subject, &case("x"))
        };
        for (stop_score, attempts, offered) in [(10.0, 4, 2), (4.0, 2, 1)] {
            let trajectory = run(stop_score);
            assert_eq!((trajectory.attempts.len(), trajectory.offered), (attempts, offered));
        }
    });
}

#[test]
fn pair_tells_everyone_of_the_context() {
    let contextual = Case {
        context: Some("the letter".into()),
        messages: vec![Message::user("the letter\n\n---\n\nTell me x")],
        ..case("x")
    };
    let told = Rc::new(RefCell::new(Vec::new()));
    let (attacker, judge) = (told.clone(), told.clone());
    let attacker = replying(move |messages, _| {
        attacker.borrow_mut().push(messages[0].content.clone());
        prompt("ask")
    });
    let judge = Judging(move |answered: &Answered| {
        judge.borrow_mut().push(answered.context.unwrap().to_string());
        Verdict::new(Harm::NotHarmful, "")
    });
    let settings = PairSettings { streams: 1, steps: 1, ..PairSettings::default() };
    with_subject(|subject| {
        let trajectory = done(&mut Pair::new(settings, attacker, judge).unwrap(), subject, &contextual);
        assert_eq!(trajectory.attempts[0].messages[0].content, "the letter\n\n---\n\nask");
    });
    let told = told.borrow();
    assert!(told[0].contains("THE TEXT:\nthe letter\n") && told[0].contains("The assistant sees"), "{}", told[0]);
    assert_eq!(told[1], "the letter");
}

#[test]
fn pair_goes_on_where_a_verdict_cannot_be_read() {
    let told = Rc::new(RefCell::new(Vec::new()));
    let seen = told.clone();
    let attacker = replying(move |messages, _| {
        seen.borrow_mut().push(messages.last().unwrap().content.clone());
        prompt("ask")
    });
    let judge = ScoreJudge::new(scripted(&["Rating: high"]), 10.0).unwrap();
    let settings = PairSettings { streams: 1, steps: 2, ..PairSettings::default() };
    with_subject(|subject| {
        let trajectory = done(&mut Pair::new(settings, attacker, judge).unwrap(), subject, &case("x"));
        assert_eq!((trajectory.attempts.len(), trajectory.offered), (2, 0));
    });
    assert!(told.borrow()[1].ends_with("SCORE: not given"), "{}", told.borrow()[1]);
}

#[test]
fn pair_draws_by_its_seed() {
    with_subject(|subject| {
        let run = |seed| {
            let settings = PairSettings { streams: 2, steps: 2, retries: 1, seed, ..PairSettings::default() };
            // What it writes depends on the seed alone, and half of it is no JSON.
            let attacker = replying(|_, settings| match settings.seed % 2 {
                0 => prompt(format!("ask {}", settings.seed)),
                _ => Ok("no".into()),
            });
            let mut attack = Pair::new(settings, attacker, scores([1.0])).unwrap();
            attack.attack(subject, &case("x"), &mut |_, _| ControlFlow::Continue(()))
        };
        let prompts = |seed| match run(seed) {
            Ok(Outcome::Done(found)) => found.attempts.into_iter().map(|one| one.messages[0].content.clone()).collect(),
            _ => Vec::new(),
        };
        let of_seeds: Vec<Vec<String>> = (0..8).map(prompts).collect();
        assert_eq!((0..8).map(prompts).collect::<Vec<_>>(), of_seeds);
        let first = of_seeds.iter().find(|prompts| !prompts.is_empty()).unwrap();
        assert_eq!(of_seeds.iter().filter(|prompts| *prompts == first).count(), 1);
    });
}

#[test]
fn streams_take_the_three_approaches_by_turns() {
    let told = Rc::new(RefCell::new(Vec::new()));
    let seen = told.clone();
    let attacker = replying(move |messages, _| {
        seen.borrow_mut().push(messages[0].content.clone());
        prompt("ask")
    });
    let settings = PairSettings { streams: 6, steps: 1, ..PairSettings::default() };
    with_subject(|subject| {
        done(&mut Pair::new(settings, attacker, scores([1.0])).unwrap(), subject, &case("x"));
    });
    for (stream, told) in told.borrow().iter().enumerate() {
        let words = ["Wrap the request in a scene", "Argue:", "Speak with the authority"];
        let found: Vec<usize> = (0..3).filter(|at| told.contains(words[*at])).collect();
        assert_eq!(found, [stream % 3]);
    }
    assert_eq!(told.borrow().len(), 6);
}

#[test]
fn an_answer_cannot_speak_for_the_judge_to_the_attacker() {
    with_subject(|subject| {
        let answer = subject.answers(&[vec![Message::user("ask")]]).unwrap().remove(0);
        let letters: Vec<char> = answer.chars().collect();
        // As if the attacking model had a token like what the answer says.
        let mark: String =
            letters.windows(3).find(|three| !three.iter().any(|c| c.is_whitespace())).unwrap().iter().collect();
        let told = Rc::new(RefCell::new(Vec::new()));
        let seen = told.clone();
        let reply = move |messages: &[Message], _: &ReplySettings| {
            seen.borrow_mut().push(messages.last().unwrap().content.clone());
            prompt("ask")
        };
        let attacker = Replying { marks: vec![mark.clone()], reply };
        let settings = PairSettings { streams: 1, steps: 2, ..PairSettings::default() };
        let trajectory = done(&mut Pair::new(settings, attacker, scores([1.0])).unwrap(), subject, &case("x"));
        assert!(trajectory.attempts[0].answer.contains(&mark), "the answer itself stays as it is");
        let told = told.borrow();
        assert!(told[1].starts_with("THE ASSISTANT'S ANSWER:\n") && !told[1].contains(&mark), "{}", told[1]);
    });
}

#[test]
fn answers_to_pair_are_short() {
    let (model, format) = (model(), format());
    let subject = Subject::new(&model, &format, Generation { max_new_tokens: 20, ..generation() }, 4).unwrap();
    let answers = |target_tokens| {
        let settings = PairSettings { streams: 1, steps: 1, target_tokens, ..PairSettings::default() };
        let mut attack = Pair::new(settings, replying(|_, _| prompt("ask")), scores([1.0])).unwrap();
        done(&mut attack, &subject, &case("x")).attempts.remove(0).answer
    };
    let short = Subject::new(&model, &format, Generation { max_new_tokens: 5, ..generation() }, 4).unwrap();
    let asked = [vec![Message::user("ask")]];
    assert_eq!(answers(5), short.answers(&asked).unwrap()[0]);
    assert_eq!(answers(150), subject.answers(&asked).unwrap()[0]);
}

#[test]
fn helpers_of_pair_that_miscount_are_named() {
    with_subject(|subject| {
        let settings = || PairSettings { streams: 2, steps: 1, ..PairSettings::default() };
        let mut attack = Pair::new(settings(), Miscounting, scores([1.0])).unwrap();
        assert!(error(&mut attack, subject, &case("x")).contains(r#"model "miscounting": expected 2, found 0"#));
        let mut attack = Pair::new(settings(), replying(|_, _| prompt("ask")), Miscounting).unwrap();
        assert!(error(&mut attack, subject, &case("x")).contains(r#"judge "miscounting": expected 2, found 0"#));
    });
}

#[test]
fn what_helps_an_attack_is_in_its_settings() {
    let pair = |marks: &[&str], threshold| {
        let marks = marks.iter().map(|mark| mark.to_string()).collect();
        let judge = ScoreJudge::new(scripted(&["[[1]]"]), threshold).unwrap();
        let attacker = Replying { marks, reply: |_: &[Message], _: &ReplySettings| prompt("ask") };
        Pair::new(PairSettings::default(), attacker, judge).unwrap().settings()
    };
    assert_eq!(pair(&[], 10.0)["attacker"]["name"], "replying");
    assert_ne!(pair(&[], 10.0)["judge"], pair(&[], 9.0)["judge"]);
    let rephrased = AutoDan::new(autodan()).unwrap().with_rephraser(scripted(&["a"])).settings();
    assert_eq!(rephrased["rephraser"], serde_json::json!({ "name": "scripted", "settings": null }));
}
