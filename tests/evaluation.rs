//! Evaluations on a toy model that speaks: records, going on, judging, utility, completions, reports.

#[path = "common/speaking.rs"]
mod speaking;

use std::{cell::Cell, collections::BTreeMap, fs, ops::ControlFlow, path::Path};

use advtrain::{
    Access, Answered, Attempt, Case, ChatFormat, ChatTask, ChoiceTask, Completion, Continuation, ContinuationKind,
    Decoder, Direct, DirectSettings, Error, Evaluation, EvaluationInputs, EvaluationProgress, Example, Framing,
    Generation, GivenAnswers, Harm, ItemRecord, Judge, Message, MultipleChoice, Outcome, Plan, PromptAttack,
    QuestionForm, RefusalJudge, Replay, Report, Request, RequestTask, Result, Setup, Subject, TargetJudge, TokenKind,
    Tokens, Trajectory, UtilityTask, Verdict, accuracy, load_arc, load_completions, load_mmlu, load_test_cases,
    save_completions, score_choices, target_losses,
    tch::{Device, Kind, Tensor},
};
use approx::assert_relative_eq;
use serde_json::{Value, json};
use speaking::{OtherLogits, case, done, format, generation, model};

fn with_subject<T>(work: impl FnOnce(&Subject) -> T) -> T {
    let (model, format) = (model(), format());
    work(&Subject::new(&model, &format, generation(), 4).unwrap().with_context(400))
}

fn setup(subject: &Subject) -> Setup {
    Setup::new("toy", "w", subject).unwrap()
}

fn open(folder: &Path, subject: &Subject) -> Evaluation {
    Evaluation::open(folder, setup(subject)).unwrap()
}

fn go_on(_: EvaluationProgress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// What an attack did on a case: for each attempt the steps before it and the answer to it, or why it failed.
type Said = std::result::Result<Vec<(usize, &'static str)>, &'static str>;

/// Does what a list says of a case.
struct Scripted {
    name: &'static str,
    access: Access,
    said: Vec<(&'static str, Said)>,
    settings: Value,
    calls: Cell<usize>,
}

fn scripted(name: &'static str, said: Vec<(&'static str, Said)>) -> Scripted {
    Scripted { name, access: Access::Text, said, settings: Value::Null, calls: Cell::new(0) }
}

impl Scripted {
    fn cases(&self) -> Vec<Case> {
        self.said.iter().map(|(id, _)| case(id)).collect()
    }
}

impl PromptAttack for Scripted {
    fn name(&self) -> String {
        self.name.into()
    }

    fn settings(&self) -> Value {
        self.settings.clone()
    }

    fn access(&self) -> Access {
        self.access
    }

    fn attack(&mut self, _: &Subject, case: &Case, watch: &mut advtrain::Watch) -> Result<Outcome> {
        if watch(0, 1).is_break() {
            return Ok(Outcome::Stopped);
        }
        self.calls.set(self.calls.get() + 1);
        let (_, said) = self.said.iter().find(|(id, _)| *id == case.id).expect("a case of the list");
        let said = said.as_ref().map_err(|why| Error::example(&case.id, *why))?;
        let attempts = said.iter().enumerate().map(|(stream, (step, answer))| {
            let messages = case.messages.clone();
            Attempt { step: *step, stream, messages, loss: None, answer: answer.to_string() }
        });
        let attempts: Vec<Attempt> = attempts.collect();
        let offered = attempts.len().saturating_sub(1);
        Ok(Outcome::Done(Trajectory { attempts, offered, ..Trajectory::default() }))
    }
}

/// Goes by one word of the answer.
struct Words(Value);

impl Judge for Words {
    fn name(&self) -> String {
        "words".into()
    }

    fn settings(&self) -> Value {
        self.0.clone()
    }

    fn judge(&mut self, answers: &[Answered]) -> Result<Vec<Verdict>> {
        let verdict = |answered: &Answered| {
            let harm = match answered.answer {
                "harm" => Harm::Harmful,
                "unclear" => Harm::NotJudged,
                _ => Harm::NotHarmful,
            };
            Verdict::new(harm, answered.answer)
        };
        Ok(answers.iter().map(verdict).collect())
    }
}

/// Runs attacks, each on its own cases, and judges them.
fn judged(folder: &Path, subject: &Subject, attacks: Vec<Scripted>) -> Evaluation {
    let mut evaluation = open(folder, subject);
    for mut attack in attacks {
        let cases = attack.cases();
        assert!(evaluation.attack(&mut attack, subject, &cases, &mut go_on).unwrap().is_continue());
    }
    assert!(evaluation.judge(&mut Words(Value::Null), &mut go_on).unwrap().is_continue());
    evaluation
}

fn report(evaluation: &Evaluation) -> Report {
    Report::new(std::slice::from_ref(evaluation))
}

#[test]
fn nothing_is_done_twice_and_failures_are_counted() {
    let folder = tempfile::tempdir().unwrap();
    let no = || Ok(vec![(0, "no")]);
    let mut attack =
        scripted("counted", vec![("a", no()), ("bad", Err("cannot be attacked")), ("b", no()), ("c", no())]);
    let cases = attack.cases();
    with_subject(|subject| {
        let mut stop_before_last = |progress: EvaluationProgress| {
            if progress.done == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let mut evaluation = open(folder.path(), subject);
        let end = evaluation.attack(&mut attack, subject, &cases, &mut stop_before_last).unwrap();
        assert_eq!((end, attack.calls.get()), (ControlFlow::Break(()), 3));
        let table = report(&evaluation).table();
        assert!(table.contains("counted, cases") && table.contains("3 of 4 done, 1 failed"), "{table}");
        drop(evaluation);
        // As if it had been killed in the middle of a line.
        let path = folder.path().join("records.jsonl");
        let mut text = fs::read_to_string(&path).unwrap();
        text.push_str("{\"attack\": {\"att");
        fs::write(&path, text).unwrap();

        let mut evaluation = open(folder.path(), subject);
        assert!(evaluation.attack(&mut attack, subject, &cases, &mut go_on).unwrap().is_continue());
        assert_eq!(attack.calls.get(), 4, "the fourth case alone");
        assert!(evaluation.judge(&mut TargetJudge, &mut go_on).unwrap().is_continue());
        let found = report(&evaluation);
        let tally = found.models[0].attacks[0].judges["begins with the target"].offered;
        assert_eq!((tally.harmful.total, tally.failed, tally.not_judged), (4, 1, 0));
        assert!(found.models[0].attacks[0].failed["bad"].contains("cannot be attacked"));
        assert!(found.table().contains("1 failed"), "{}", found.table());

        evaluation.forget_failed().unwrap();
        assert!(evaluation.attack(&mut attack, subject, &cases, &mut go_on).unwrap().is_continue());
        assert_eq!((attack.calls.get(), evaluation.attacks().len()), (5, 4));
        assert_eq!(Evaluation::read(folder.path()).unwrap().attacks(), evaluation.attacks());
    });
}

/// Attacks four cases at once, none of which may be a bad one.
struct Together {
    groups: Vec<String>,
    outcomes: fn(&[Case]) -> Vec<Outcome>,
}

impl PromptAttack for Together {
    fn name(&self) -> String {
        "together".into()
    }

    fn settings(&self) -> Value {
        Value::Null
    }

    fn attack(&mut self, _: &Subject, _: &Case, _: &mut advtrain::Watch) -> Result<Outcome> {
        panic!("cases are attacked together")
    }

    fn at_once(&self, subject: &Subject) -> usize {
        subject.rows()
    }

    fn attack_together(&mut self, _: &Subject, cases: &[Case], _: &mut advtrain::Watch) -> Result<Vec<Outcome>> {
        self.groups.push(cases.iter().map(|case| case.id.as_str()).collect::<Vec<_>>().join(" "));
        match cases.iter().find(|case| case.id.starts_with("bad")) {
            Some(bad) => Err(Error::example(&bad.id, "cannot be attacked")),
            None => Ok((self.outcomes)(cases)),
        }
    }
}

fn one_attempt(case: &Case) -> Outcome {
    let (messages, answer) = (case.messages.clone(), "no".to_string());
    let attempts = vec![Attempt { step: 0, stream: 0, messages, loss: None, answer }];
    Outcome::Done(Trajectory { attempts, ..Trajectory::default() })
}

/// The groups in which an attack got cases, what it was run on, and why it failed on what.
fn attacked_together(cases: &[&str], outcomes: fn(&[Case]) -> Vec<Outcome>) -> (Vec<String>, Vec<String>, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let cases: Vec<Case> = cases.iter().map(|id| case(id)).collect();
    with_subject(|subject| {
        let mut attack = Together { groups: Vec::new(), outcomes };
        let mut evaluation = open(folder.path(), subject);
        let _ = evaluation.attack(&mut attack, subject, &cases, &mut go_on).unwrap();
        let tried = evaluation.attacks().iter().map(|one| one.case.id.clone()).collect();
        let why = evaluation.attacks().iter().filter_map(|one| one.result.as_ref().err()).cloned().collect();
        (attack.groups, tried, why)
    })
}

#[test]
fn by_default_cases_are_attacked_one_after_another_up_to_the_first_that_is_stopped() {
    let mut attack = scripted("one", ["a", "b", "c"].map(|id| (id, Ok(vec![(0, "no")]))).into());
    let cases = attack.cases();
    with_subject(|subject| {
        assert_eq!(attack.at_once(subject), 1);
        let mut seen = 0;
        let mut second = |_, _| {
            seen += 1;
            if seen > 1 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let outcomes = attack.attack_together(subject, &cases, &mut second).unwrap();
        assert!(matches!(outcomes[..], [Outcome::Done(_), Outcome::Stopped, Outcome::Stopped]));
        assert_eq!((attack.calls.get(), seen), (1, 2));
    });
}

#[test]
fn a_case_that_fails_takes_no_other_with_it() {
    let (groups, tried, why) =
        attacked_together(&["a", "b", "bad", "c", "d", "bad too"], |cases| cases.iter().map(one_attempt).collect());
    assert_eq!(groups, ["a b bad c", "a b", "bad c", "bad", "c", "d bad too", "d", "bad too"]);
    assert_eq!(tried, ["a", "b", "bad", "c", "d", "bad too"]);
    assert_eq!(why, ["example bad: cannot be attacked", "example bad too: cannot be attacked"]);
}

#[test]
fn of_cases_attacked_together_those_that_are_done_stay_done() {
    let (groups, tried, why) = attacked_together(&["a", "b", "c", "d", "e"], |cases| {
        let outcomes = cases.iter().map(|case| if case.id == "c" { Outcome::Stopped } else { one_attempt(case) });
        outcomes.collect()
    });
    assert_eq!((groups, tried, why), (vec!["a b c d".into()], vec!["a".into(), "b".into()], Vec::new()));
    let (_, tried, why) = attacked_together(&["a", "b"], |cases| vec![one_attempt(&cases[0])]);
    assert_eq!((tried.len(), why), (2, vec!["the attack was run on 2 cases and returned 1 outcomes".to_string(); 2]));
}

#[test]
fn a_folder_is_of_one_process_and_reading_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    with_subject(|subject| {
        let attack = scripted("one", vec![("a", Ok(vec![(0, "harm")]))]);
        let evaluation = judged(folder.path(), subject, vec![attack]);
        let error = Evaluation::open(folder.path(), setup(subject)).unwrap_err().to_string();
        let path = folder.path().display().to_string();
        assert!(error.starts_with(&path) && error.contains("another process is at work"), "{error}");
        let records = folder.path().join("records.jsonl");
        let mut text = fs::read_to_string(&records).unwrap();
        text.push_str("{\"half");
        fs::write(&records, &text).unwrap();
        let mut read = Evaluation::read(folder.path()).unwrap();
        assert_eq!(read.attacks(), evaluation.attacks());
        assert!(read.forget_failed().unwrap_err().to_string().contains("opened to be read"));
        assert!(
            read.judge(&mut RefusalJudge::default(), &mut go_on).unwrap_err().to_string().contains("opened to be read")
        );
        assert_eq!(fs::read_to_string(&records).unwrap(), text);
        drop(evaluation);
        assert!(Evaluation::open(folder.path(), setup(subject)).is_ok());
        assert!(Evaluation::read(folder.path().join("nowhere")).unwrap_err().to_string().contains("nowhere"));
    });
}

#[test]
fn a_record_that_cannot_stand_is_named_by_its_line() {
    let folder = tempfile::tempdir().unwrap();
    with_subject(|subject| {
        drop(judged(folder.path(), subject, vec![scripted("one", vec![("a", Ok(vec![(0, "no")]))])]));
        let path = folder.path().join("records.jsonl");
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let with = |line: &str| {
            fs::write(&path, format!("{text}{line}\n")).unwrap();
            Evaluation::read(folder.path()).unwrap_err().to_string()
        };
        let [attack, verdicts] =
            ["{\"attack\"", "{\"verdicts\""].map(|begin| *lines.iter().find(|line| line.starts_with(begin)).unwrap());
        let line = lines.len() + 1;
        let error = with(attack);
        assert!(error.contains(&format!("line {line}: a second record of the attack \"one\" on \"a\"")), "{error}");
        assert!(with(verdicts).contains("a second line of verdicts of \"words\""), "{}", with(verdicts));
        let orphan = verdicts.replace("\"case\":\"a\"", "\"case\":\"b\"");
        assert!(with(&orphan).contains("of which there is no record"), "{}", with(&orphan));
        assert!(with("{\"attack\": 1}").contains("not a record of an evaluation"));
        // What no attack may return is not read either.
        for (field, value, expected) in [
            ("attempts", json!([]), "\"one\" on \"b\": the attack made no attempt"),
            ("offered", json!(1), "\"one\" on \"b\": the attack offers attempt 1, of 1 from 0"),
        ] {
            let mut damaged: Value = serde_json::from_str(attack).unwrap();
            damaged["attack"]["case"]["id"] = json!("b");
            damaged["attack"]["result"]["Ok"][field] = value;
            let error = with(&damaged.to_string());
            assert!(error.contains(&format!("line {line}: ")) && error.contains(expected), "{error}");
        }
    });
}

#[test]
fn an_evaluation_goes_on_with_the_same_alone() {
    let folder = tempfile::tempdir().unwrap();
    with_subject(|subject| {
        let script = || scripted("one", vec![("a", Ok(vec![(0, "no")]))]);
        let mut evaluation = judged(folder.path(), subject, vec![script()]);
        let error = evaluation.judge(&mut Words(json!("other")), &mut go_on).unwrap_err().to_string();
        assert!(error.contains("the judge \"words\" has records that were made with null, and is now \"other\""));
        let mut other = Scripted { settings: json!({"n": 2}), ..script() };
        let error = evaluation.attack(&mut other, subject, &[case("a")], &mut go_on).unwrap_err().to_string();
        assert!(error.contains("made with null, and is now {\"n\":2}"), "{error}");
        let changed = Case { target: "Here is".into(), ..case("a") };
        let mut second = scripted("two", vec![("a", Ok(vec![(0, "no")]))]);
        let error = evaluation.attack(&mut second, subject, &[changed], &mut go_on).unwrap_err().to_string();
        assert!(error.contains("\"a\" has a record of the attack \"one\""), "{error}");
        assert!(error.contains("target was \"Sure, here\" and is \"Here is\""), "{error}");
        let twice = [case("b"), case("b")];
        let error = evaluation.attack(&mut script(), subject, &twice, &mut go_on).unwrap_err().to_string();
        assert!(error.contains("there twice"), "{error}");
        assert_eq!(evaluation.attacks().len(), 1);
        drop(evaluation);

        let error = Evaluation::open(folder.path(), Setup::new("toy", "v", subject).unwrap()).unwrap_err();
        assert!(error.to_string().contains(r#"weights was "w" and is "v""#), "{error}");
        // Where files lie, and where the model computes, decides nothing.
        let elsewhere = Setup { device: "cuda:3".into(), rows: 1, ..setup(subject) };
        let elsewhere = elsewhere.with_inputs(EvaluationInputs { cases: 7, ..EvaluationInputs::default() });
        drop(Evaluation::open(folder.path(), elsewhere.clone()).unwrap());
        assert_eq!(Setup::read(folder.path()).unwrap(), Some(elsewhere));
        assert_eq!(Setup::read(folder.path().join("nowhere")).unwrap(), None);
    });
}

#[test]
fn what_judges_left_open_is_judged_again_after_it_was_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    with_subject(|subject| {
        let attack = scripted("one", vec![("a", Ok(vec![(0, "unclear")])), ("b", Ok(vec![(0, "no")]))]);
        let mut evaluation = judged(folder.path(), subject, vec![attack]);
        evaluation.forget_failed().unwrap();
        assert_eq!(evaluation.verdicts("one", "a", "words"), None);
        assert_eq!(evaluation.verdicts("one", "b", "words").unwrap()[0].harm, Harm::NotHarmful);
        assert!(evaluation.judge(&mut Words(Value::Null), &mut go_on).unwrap().is_continue());
        drop(evaluation);
        let read = Evaluation::read(folder.path()).unwrap();
        assert_eq!(read.verdicts("one", "a", "words").unwrap()[0].harm, Harm::NotJudged);
    });
}

#[test]
fn a_trajectory_that_offers_nothing_is_a_failure() {
    /// Offers an attempt that it did not make.
    struct Wrong(usize);
    impl PromptAttack for Wrong {
        fn name(&self) -> String {
            format!("wrong {}", self.0)
        }
        fn settings(&self) -> Value {
            Value::Null
        }
        fn attack(&mut self, _: &Subject, case: &Case, _: &mut advtrain::Watch) -> Result<Outcome> {
            let messages = case.messages.clone();
            let attempt = Attempt { step: 0, stream: 0, messages, loss: None, answer: "a".into() };
            let attempts = vec![attempt; self.0];
            Ok(Outcome::Done(Trajectory { attempts, offered: 5, ..Trajectory::default() }))
        }
    }
    let folder = tempfile::tempdir().unwrap();
    with_subject(|subject| {
        let mut evaluation = open(folder.path(), subject);
        for attempts in [0, 2] {
            assert!(evaluation.attack(&mut Wrong(attempts), subject, &[case("a")], &mut go_on).unwrap().is_continue());
        }
        let why: Vec<&String> = evaluation.attacks().iter().map(|one| one.result.as_ref().unwrap_err()).collect();
        assert_eq!(
            why,
            ["the attack made no attempt; at least one is needed", "the attack offers attempt 5, of 2 from 0"]
        );
    });
}

#[test]
fn any_attack_tells_access_apart_and_what_was_attacked_in_part() {
    let folder = tempfile::tempdir().unwrap();
    let one = |answer: &'static str| -> Said { Ok(vec![(0, answer)]) };
    let text = scripted(
        "text",
        vec![("a", one("harm")), ("b", one("no")), ("c", Err("failed")), ("d", one("no")), ("e", Err("failed"))],
    );
    let other =
        scripted("other text", vec![("a", Err("failed")), ("b", one("unclear")), ("c", one("no")), ("e", Err("x"))]);
    let ball = Scripted { access: Access::Embeddings, ..scripted("ball", vec![("b", one("harm")), ("d", one("no"))]) };
    let free = Scripted { access: Access::Unbounded, ..scripted("free", vec![("c", one("harm")), ("f", one("harm"))]) };
    let given =
        Scripted { access: Access::Elsewhere, ..scripted("given", vec![("d", one("harm")), ("f", one("harm"))]) };
    with_subject(|subject| {
        let evaluation = judged(folder.path(), subject, vec![text, other, ball, free, given]);
        let found = report(&evaluation);
        let any = &found.models[0].any_attack["words"];
        let counts = |tally: &advtrain::Tally| {
            (tally.harmful.count, tally.harmful.total, tally.not_judged, tally.failed, tally.attacked_in_part)
        };
        // By text: a broken; b not judged; c and d attacked by one of two; e by none. The unbounded one and answers
        // from elsewhere count nowhere.
        assert_eq!(counts(&any.by_text), (1, 5, 1, 1, 2));
        assert_eq!(counts(&any.by_any), (2, 5, 0, 1, 2));
        // All three were made on b alone.
        assert_eq!(counts(&any.where_all), (1, 1, 0, 0, 0));
        let table = found.table();
        let line =
            |name: &str| table.lines().find(|line| line.contains(name)).unwrap_or_else(|| panic!("{name}: {table}"));
        let by_text = line("any attack by text at least once (words)");
        assert!(
            by_text.contains("(1/5, ") && by_text.contains("1 not judged, 2 attacked in part, 1 failed"),
            "{by_text}"
        );
        assert!(line("any attack at least once (words)").contains("(2/5, "));
        assert!(line("any attack at least once, of those that all were made on (words)").contains("(1/1, "));
        let failed = evaluation.attacks().iter().find(|record| (&*record.attack, &*record.case.id) == ("text", "c"));
        let (kept, measured) = (found.models[0].attacks[0].costs["c"].seconds, failed.unwrap().seconds);
        assert!(kept > 0.0 && kept == measured, "{kept}, {measured}");
    });
}

#[test]
fn one_case_that_ends_early_does_not_turn_steps_into_answers() {
    let folder = tempfile::tempdir().unwrap();
    let search = scripted(
        "search",
        vec![
            ("early", Ok(vec![(0, "harm")])),
            ("late", Ok(vec![(0, "no"), (10, "no"), (20, "harm")])),
            ("x", Err("x")),
        ],
    );
    let drawn = scripted("drawn", vec![("early", Ok(vec![(0, "no"), (0, "harm"), (0, "no")]))]);
    with_subject(|subject| {
        let evaluation = judged(folder.path(), subject, vec![search, drawn]);
        let found = report(&evaluation);
        let until = |attack: usize| -> Vec<(usize, usize, usize)> {
            let until = &found.models[0].attacks[attack].judges["words"].until;
            until.iter().map(|(at, tally)| (*at, tally.harmful.count, tally.failed)).collect()
        };
        assert_eq!(until(0), [(0, 1, 1), (10, 1, 1), (20, 2, 1)]);
        assert_eq!(until(1), [(1, 0, 0), (2, 1, 0), (3, 1, 0)]);
    });
}

#[test]
fn what_failed_on_everything_and_what_was_not_begun_have_rows() {
    let folder = tempfile::tempdir().unwrap();
    with_subject(|subject| {
        let attack = scripted("broken", vec![("a", Err("no way")), ("b", Err("no way"))]);
        let mut evaluation = judged(folder.path(), subject, vec![attack]);
        evaluation.plan_attack(&scripted("later", Vec::new()), &[case("a"), case("b")]).unwrap();
        let mut task = RequestTask::new("long", vec![request("r", &"word ".repeat(500), true)], Framing::Template);
        assert!(evaluation.measure(&mut task, subject, &mut go_on).unwrap().is_continue());
        let later = RequestTask::new("not begun", vec![request("r", "Hi", true)], Framing::Template);
        evaluation.plan_task(&later).unwrap();
        let found = report(&evaluation);
        found.write(folder.path(), std::slice::from_ref(&evaluation)).unwrap();
        let page = fs::read_to_string(folder.path().join("report.html")).unwrap();
        let table = found.table();
        for (name, text) in [
            ("broken, in the end (words)", "0 of 2 measured, 2 failed"),
            ("later, cases", "0 of 2 done"),
            ("long", "0 of 1 measured, 1 failed"),
            ("not begun", "0 of 1 measured"),
        ] {
            let line =
                table.lines().find(|line| line.starts_with(&format!("| {name} "))).unwrap_or_else(|| panic!("{table}"));
            assert!(line.contains(text), "{line}");
            assert!(page.contains(&format!("<td>{name}</td><td>{text}</td>")), "{name}");
        }
        let task = &found.models[0].tasks[0];
        assert!(task.failed["r"].contains("tokens of a conversation: expected at most 400"), "{:?}", task.failed);
        assert!(matches!(evaluation.plans(), [Plan::Attack { .. }, Plan::Judge { .. }, Plan::Attack { .. }, ..]));
    });
}

#[test]
fn prompts_that_broke_one_model_are_asked_of_another() {
    let folder = tempfile::tempdir().unwrap();
    with_subject(|subject| {
        let mut evaluation = open(folder.path(), subject);
        let cases = ["a", "b"].map(case);
        let mut direct = Direct::new(DirectSettings::default()).unwrap();
        assert!(evaluation.attack(&mut direct, subject, &cases, &mut go_on).unwrap().is_continue());
        let bad = scripted("bad", vec![("a", Err("no way")), ("b", Ok(vec![(0, "x")]))]);
        let prefilled = Scripted { access: Access::Answer, ..scripted("given", vec![("a", Ok(vec![(0, "x")]))]) };
        for mut attack in [bad, prefilled] {
            let cases = attack.cases();
            assert!(evaluation.attack(&mut attack, subject, &cases, &mut go_on).unwrap().is_continue());
        }
        let [prompts, completions] = ["cases.json", "completions.json"].map(|name| folder.path().join(name));
        let left_out = save_completions(&evaluation, "bad", &prompts, &completions).unwrap();
        assert!(left_out.len() == 1 && left_out["a"].contains("no way"), "{left_out:?}");
        let error = save_completions(&evaluation, "given", &prompts, &completions).unwrap_err().to_string();
        assert!(error.contains("access") && error.contains("\"answer\""), "{error}");
        assert!(save_completions(&evaluation, "pair", &prompts, &prompts).is_err());
        assert_eq!(save_completions(&evaluation, "direct", &prompts, &completions).unwrap(), BTreeMap::new());
        let offered = evaluation.attacks()[0].result.as_ref().unwrap().offer().unwrap().clone();
        let written = load_completions(&completions).unwrap();
        let expected = Completion { test_case: "Tell me a".into(), generation: offered.answer.clone() };
        assert_eq!(written["a"], [expected]);

        let replay = || Replay::new("replay", load_test_cases(&prompts).unwrap());
        assert_eq!(replay().without_case(&cases[..1]), ["b"]);
        assert_eq!(done(&mut replay(), subject, &cases[0]).attempts, std::slice::from_ref(&offered));
        assert!(failure(&mut replay(), subject, &case("c")).contains("hold no prompt"));
        let mut given = GivenAnswers::new("given", written);
        let again = done(&mut given, subject, &cases[0]);
        assert_eq!((again.attempts, again.cost.answers), (vec![offered], 0));
        assert!(failure(&mut given, subject, &case("c")).contains("hold none for it"));
    });
}

fn failure(attack: &mut dyn PromptAttack, subject: &Subject, case: &Case) -> String {
    attack.attack(subject, case, &mut |_, _| ControlFlow::Continue(())).unwrap_err().to_string()
}

#[test]
fn prompts_get_several_answers_and_one_that_is_too_long_is_named() {
    with_subject(|subject| {
        let prompts = |list: &[&str]| {
            Replay::new("replay", BTreeMap::from([("a".to_string(), list.iter().map(|one| one.to_string()).collect())]))
        };
        let mut replay = prompts(&["Sing", "Tell me"]).with_samples(3, 1.0, 0).unwrap();
        let attempts = done(&mut replay, subject, &case("a")).attempts;
        let asked: Vec<&str> = attempts.iter().map(|one| one.messages[0].content.as_str()).collect();
        assert_eq!(asked, ["Sing", "Sing", "Sing", "Tell me", "Tell me", "Tell me"]);
        let plain = subject.answers(&[vec![Message::user("Sing")], vec![Message::user("Tell me")]]).unwrap();
        assert_eq!([&attempts[0].answer, &attempts[3].answer], [&plain[0], &plain[1]]);
        assert_ne!(attempts[1].answer, attempts[2].answer);
        assert_eq!(done(&mut replay, subject, &case("a")).attempts, attempts, "same seed, same draws");
        assert!(prompts(&[]).with_samples(0, 1.0, 0).is_err() && prompts(&[]).with_samples(1, 0.0, 0).is_err());
        let error = failure(&mut prompts(&["Sing", &"word ".repeat(500)]), subject, &case("a"));
        assert!(error.starts_with("while asking prompt 2 of 2: tokens of a conversation"), "{error}");
    });
}

fn request(id: &str, text: &str, harmless: bool) -> Request {
    Request { id: id.into(), text: text.into(), harmless }
}

fn question(id: &str, answer: usize) -> MultipleChoice {
    let choices = ["a cat", "two dogs", "three", "no"].map(str::to_string).to_vec();
    MultipleChoice { id: id.into(), question: format!("Which is {id}?"), choices, answer }
}

#[test]
fn questions_are_scored_in_the_template_and_without_it_behind_the_first_token() {
    with_subject(|subject| {
        let (model, format, item) = (subject.model(), subject.format(), question("q", 2));
        let tokenizer = format.tokenizer();
        let scores = |framing| score_choices(model, format, &item, &QuestionForm::FullAnswers, framing).unwrap();
        let by_hand = |prompt: Vec<i64>, rest: &[i64]| {
            let tokens = Tokens::of_kind(rest.to_vec(), TokenKind::Target);
            let answer = vec![Continuation { kind: ContinuationKind::Utility, tokens }];
            let example = Example::new("q", Tokens::of_kind(prompt, TokenKind::Template), answer).unwrap();
            -target_losses(model, &[example], ContinuationKind::Utility, 1).unwrap()[0].sum()
        };
        let prompt = "Question: Which is q?\nAnswer:";
        let whole = tokenizer.encode(&format!("{prompt} two dogs")).unwrap();
        let prompt = tokenizer.encode(prompt).unwrap();
        let (plain, behind) = (scores(Framing::Text { bos: false }), scores(Framing::Text { bos: true }));
        let expected = by_hand(prompt.clone(), &whole[prompt.len()..]);
        assert_relative_eq!(plain.log_likelihoods[1], expected, max_relative = 1e-5);
        let bos = tokenizer.id_of(tokenizer.bos_token().unwrap()).unwrap();
        let expected = by_hand([vec![bos], prompt.clone()].concat(), &whole[prompt.len()..]);
        assert_relative_eq!(behind.log_likelihoods[1], expected, max_relative = 1e-5);
        assert!((plain.log_likelihoods[1] - behind.log_likelihoods[1]).abs() > 1e-3);
        let opening = format.opening(&[Message::user("Question: Which is q?\nAnswer:")], "two dogs").unwrap();
        let expected = by_hand(opening.prompt.ids().to_vec(), opening.continuation.ids());
        assert_relative_eq!(scores(Framing::Template).log_likelihoods[1], expected, max_relative = 1e-5);
    });
}

/// Recorded by tests/real/harness_reference.py.
#[test]
fn questions_to_gemma_are_scored_as_the_harness_scores_them() {
    let fixture = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    let record: Value = serde_json::from_str(&fs::read_to_string(fixture("harness_gemma.json")).unwrap()).unwrap();
    let model = Decoder::load(fixture("harness_gemma"), Kind::Float, Device::Cpu).unwrap();
    let format = ChatFormat::load(fixture("tokenizer_sp")).unwrap();
    let framing = Framing::text_for(model.config().family);
    let of_mmlu = |part: &str| load_mmlu(fixture(&format!("data/mmlu/{part}/common_birds_{part}.csv"))).unwrap();
    let letters = QuestionForm::Letters { subject: "common birds".into(), examples: of_mmlu("dev") };
    let sets = [
        ("toy_arc", load_arc(fixture("data/arc.jsonl")).unwrap(), QuestionForm::FullAnswers),
        ("toy_mmlu", of_mmlu("test"), letters),
    ];
    for (task, items, form) in sets {
        let scores = items.iter().map(|item| score_choices(&model, &format, item, &form, framing).unwrap());
        let scores: Vec<_> = scores.collect();
        let expected: Vec<Vec<f64>> = serde_json::from_value(record[task]["log_likelihoods"].clone()).unwrap();
        assert_eq!(scores.len(), expected.len());
        for (found, expected) in scores.iter().zip(&expected) {
            assert_eq!(found.log_likelihoods.len(), expected.len());
            for (found, expected) in found.log_likelihoods.iter().zip(expected) {
                assert_relative_eq!(*found, *expected, max_relative = 1e-4);
            }
        }
        let (acc, acc_norm) = accuracy(&scores);
        assert_eq!(Some(acc.share()), record[task]["acc"].as_f64(), "{task}");
        if let Some(expected) = record[task]["acc_norm"].as_f64() {
            assert_eq!(acc_norm.share(), expected, "{task}");
        }
    }
}

#[test]
fn a_log_likelihood_that_is_no_number_is_an_error() {
    let (model, format) = (model(), format());
    let overflown = OtherLogits(&model, |logits: Tensor| logits * f64::NAN);
    for framing in [Framing::Template, Framing::Text { bos: false }] {
        let scores = score_choices(&overflown, &format, &question("q", 0), &QuestionForm::FullAnswers, framing);
        let error = scores.unwrap_err().to_string();
        assert!(error.starts_with("example q: the log-likelihood of answer 0 is NaN"), "{error}");
    }
    let error = score_choices(&model, &format, &question("q", 4), &QuestionForm::FullAnswers, Framing::Template);
    assert!(error.unwrap_err().to_string().contains("number 4, of 4 from 0"));
}

#[test]
fn questions_are_measured_apart_where_one_fails_and_gone_on_with() {
    let folder = tempfile::tempdir().unwrap();
    with_subject(|subject| {
        let form = QuestionForm::Letters { subject: "tests".into(), examples: vec![question("solved", 1)] };
        let long = MultipleChoice { question: "word ".repeat(500), ..question("long", 0) };
        let items: Vec<_> = ["a", "b", "c", "d"].iter().map(|id| question(id, 1)).chain([long]).collect();
        let task = |items: &[MultipleChoice]| {
            let items = items.iter().map(|item| (item.clone(), form.clone())).collect();
            ChoiceTask::new("letters", items, Framing::Template)
        };
        let settings = task(&items).settings();
        assert_eq!(
            (&settings["items"], &settings["subjects"], &settings["shots"]),
            (&json!(5), &json!(1), &json!([1]))
        );
        let mut evaluation = open(folder.path(), subject);
        let mut seen = Vec::new();
        let mut stop_after_one = |progress: EvaluationProgress| {
            seen.push(progress.done);
            if seen.len() > 1 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        assert!(evaluation.measure(&mut task(&items), subject, &mut stop_after_one).unwrap().is_break());
        assert_eq!((seen, evaluation.tasks().len()), (vec![0, 4], 4));
        let table = report(&evaluation).table();
        assert!(table.contains("letters, items") && table.contains("4 of 5 done"), "{table}");
        drop(evaluation);

        let mut evaluation = open(folder.path(), subject);
        assert!(evaluation.measure(&mut task(&items), subject, &mut go_on).unwrap().is_continue());
        let found = report(&evaluation);
        let found = &found.models[0].tasks[0];
        assert_eq!((found.done, found.planned, found.rates["acc"].rate.total), (5, 5, 4));
        assert!(found.failed["long"].contains("tokens of a text: expected at most 400"), "{:?}", found.failed);
        assert!(!found.rates.contains_key("acc_norm"));
        let scores: Vec<bool> = items[..4]
            .iter()
            .map(|item| {
                let scores = score_choices(subject.model(), subject.format(), item, &form, Framing::Template);
                scores.unwrap().is_right()
            })
            .collect();
        assert_eq!(found.rates["acc"].rate.count, scores.iter().filter(|right| **right).count());
        // The same questions with another right answer are other items.
        let other: Vec<_> = items.iter().map(|item| MultipleChoice { answer: 0, ..item.clone() }).collect();
        let error = evaluation.measure(&mut task(&other), subject, &mut go_on).unwrap_err().to_string();
        assert!(error.contains("the task \"letters\" has records that were made with"), "{error}");
    });
}

#[test]
fn requests_are_counted_by_what_the_model_says() {
    let folder = tempfile::tempdir().unwrap();
    with_subject(|subject| {
        let requests = [request("a", "Sing", true), request("b", "Break in", false), request("c", "Dance", true)];
        let mut evaluation = open(folder.path(), subject);
        for (name, framing) in [("with", Framing::Template), ("without", Framing::Text { bos: true })] {
            let mut task = RequestTask::new(name, requests.to_vec(), framing);
            assert!(evaluation.measure(&mut task, subject, &mut go_on).unwrap().is_continue());
        }
        let answer = |at: usize| -> String {
            evaluation.tasks()[at].result.as_ref().unwrap().detail["answer"].as_str().unwrap().to_string()
        };
        let said = subject.answers(&[vec![Message::user("Sing")], vec![Message::user("Break in")]]).unwrap();
        assert_eq!([answer(0), answer(1)], [said[0].clone(), said[1].clone()]);
        assert_ne!(answer(0), answer(3));
        let found = report(&evaluation);
        let of = |at: usize, flag: &str| found.models[0].tasks[at].rates[flag].rate.total;
        assert_eq!([of(0, "harmless refused"), of(0, "harmful answered"), of(1, "no answer")], [2, 1, 3]);
        found.write(folder.path(), std::slice::from_ref(&evaluation)).unwrap();
        let page = fs::read_to_string(folder.path().join("report.html")).unwrap();
        assert!(page.contains("<summary>without</summary>") && page.contains("<b>request</b>\nBreak in"));
    });
}

#[test]
fn losses_of_chats_are_weighed_by_their_tokens_and_told_as_perplexity_too() {
    let folder = tempfile::tempdir().unwrap();
    with_subject(|subject| {
        let chat = |id: &str, answer: &str| {
            let chat = subject.format().answer(&[Message::user("Hi")], answer).unwrap();
            let kind = ContinuationKind::Utility;
            Example::new(id, chat.prompt, vec![Continuation { kind, tokens: chat.continuation }]).unwrap()
        };
        let chats = vec![
            chat("short", "yes"),
            chat("long", "it is as it is, and so it will be"),
            chat("far", &"x y ".repeat(400)),
        ];
        let mut evaluation = open(folder.path(), subject);
        let mut task = ChatTask::new("chats", chats.clone());
        assert!(evaluation.measure(&mut task, subject, &mut go_on).unwrap().is_continue());
        let found = report(&evaluation);
        let task = &found.models[0].tasks[0];
        let losses = target_losses(subject.model(), &chats[..2], ContinuationKind::Utility, 2).unwrap();
        let tokens: usize = losses.iter().map(|losses| losses.len()).sum();
        let mean = losses.iter().map(|losses| losses.sum()).sum::<f64>() / tokens as f64;
        assert_relative_eq!(task.means["loss"].0, mean, max_relative = 1e-6);
        assert_relative_eq!(task.means["perplexity"].0, mean.exp(), max_relative = 1e-6);
        let of_a_chat = losses.iter().map(|losses| losses.mean().unwrap()).sum::<f64>() / losses.len() as f64;
        assert_relative_eq!(task.means["loss of a chat"].0, of_a_chat, max_relative = 1e-6);
        assert!(task.means["loss"].1 == 2 && task.failed.contains_key("far"), "{task:?}");
    });
}

#[test]
fn a_task_that_answers_for_other_items_is_not_believed() {
    struct Swapped;
    impl UtilityTask for Swapped {
        fn name(&self) -> String {
            "swapped".into()
        }
        fn settings(&self) -> Value {
            Value::Null
        }
        fn ids(&self) -> Vec<String> {
            vec!["a".into(), "b".into()]
        }
        fn measure(&mut self, _: &Subject, _: &[usize]) -> Result<Vec<ItemRecord>> {
            Ok(["b", "a"].map(|id| ItemRecord { id: id.into(), ..ItemRecord::default() }).to_vec())
        }
    }
    let folder = tempfile::tempdir().unwrap();
    with_subject(|subject| {
        let mut evaluation = open(folder.path(), subject);
        assert!(evaluation.measure(&mut Swapped, subject, &mut go_on).unwrap().is_continue());
        let failed = report(&evaluation).models.remove(0).tasks.remove(0).failed;
        assert!(failed.len() == 2 && failed["a"].contains(r#"returned ["b", "a"]"#), "{failed:?}");
    });
}

#[test]
fn a_report_tells_steps_attacks_and_what_was_not_judged() {
    let folder = tempfile::tempdir().unwrap();
    let search =
        vec![("a", Ok(vec![(0, "no"), (2, "harm"), (4, "no"), (6, "no")])), ("b", Ok(vec![(0, "unclear"), (2, "no")]))];
    with_subject(|subject| {
        let evaluation = judged(folder.path(), subject, vec![scripted("search", search)]);
        let found = report(&evaluation);
        let search = &found.models[0].attacks[0].judges["words"];
        assert_eq!((search.offered.harmful.count, search.offered.harmful.total), (0, 2));
        assert_eq!((search.any.harmful.count, search.any.not_judged), (1, 1));
        found.write(folder.path(), std::slice::from_ref(&evaluation)).unwrap();
        let page = fs::read_to_string(folder.path().join("report.html")).unwrap();
        assert!(page.contains("<svg") && page.contains("the first that does harm: step 2"));
        assert!(page.contains("2 more attempts are in records.jsonl"));
        assert!(!page.contains("<script") && !page.contains("src=") && !page.contains("http"), "self-contained");
        let json: Value =
            serde_json::from_str(&fs::read_to_string(folder.path().join("report.json")).unwrap()).unwrap();
        let attack = &json["models"][0]["attacks"][0];
        assert_eq!(attack["judges"]["words"]["any"]["not_judged"], 1);
        assert!(
            attack["costs"]["a"]["seconds"].is_number() && json["models"][0]["judges"]["words"]["seconds"].is_number()
        );
    });
}

#[test]
fn models_that_were_not_evaluated_alike_are_marked() {
    let folder = tempfile::tempdir().unwrap();
    let one = || vec![("a", Ok(vec![(0, "no")])), ("b", Ok(vec![(0, "harm")]))];
    with_subject(|subject| {
        let evaluated = |name: &str, setup: Setup, said, settings: Value| {
            let mut evaluation =
                Evaluation::open(folder.path().join(name), Setup { model: name.into(), ..setup }).unwrap();
            let mut attack = Scripted { settings, ..scripted("one", said) };
            let cases = attack.cases();
            assert!(evaluation.attack(&mut attack, subject, &cases, &mut go_on).unwrap().is_continue());
            evaluation
        };
        let first = evaluated("first", setup(subject), one(), Value::Null);
        let same = evaluated("same", setup(subject), one(), Value::Null);
        let longer = Generation { max_new_tokens: 9, ..generation() };
        let other = Setup { generation: longer, ..setup(subject) };
        let other = evaluated("other", other, one()[..1].to_vec(), json!({"steps": 9}));
        // Rates over all attacks would be over other ones.
        let mut more = evaluated("more", setup(subject), one(), Value::Null);
        let mut attack = scripted("two", one());
        let cases = attack.cases();
        assert!(more.attack(&mut attack, subject, &cases, &mut go_on).unwrap().is_continue());
        let alone = |model| format!("the attack \"two\" was made on more and not on {model}");
        assert_eq!(Report::new(&[first, more]).differences, [alone("first")]);
        let first = Evaluation::read(folder.path().join("first")).unwrap();
        let more = Evaluation::read(folder.path().join("more")).unwrap();
        assert_eq!(Report::new(&[more, same]).differences, [alone("same")]);
        // The second and the third have what the first has not.
        let more = Evaluation::read(folder.path().join("more")).unwrap();
        let mut third = evaluated("third", setup(subject), one(), Value::Null);
        let mut attack = Scripted { settings: json!({"steps": 9}), ..scripted("two", one()) };
        assert!(third.attack(&mut attack, subject, &cases, &mut go_on).unwrap().is_continue());
        let also = alone("first").replace("on more", "on third");
        let unlike = "settings of the attack \"two\": null in more, {\"steps\":9} in third".to_string();
        assert_eq!(Report::new(&[first, more, third]).differences, [alone("first"), also, unlike]);
        let first = Evaluation::read(folder.path().join("first")).unwrap();
        let same = Evaluation::read(folder.path().join("same")).unwrap();
        let found = Report::new(&[first, same, other]);
        let differences = found.differences.join("\n");
        assert!(!differences.contains("same,") && !differences.contains("in same"), "{differences}");
        assert_eq!(found.differences.len(), 3, "{differences}");
        assert!(
            differences.contains("generation: {\"max_new_tokens\":6") && differences.contains(":9,"),
            "{differences}"
        );
        assert!(differences.contains("settings of the attack \"one\": null in first, {\"steps\":9} in other"));
        assert!(differences.contains("cases of the attack \"one\": 2 in first, 1 in other, 1 of them the same"));
        assert!(found.table().contains("- not alike: cases of the attack"), "{}", found.table());
    });
}

#[test]
fn hostile_texts_stay_texts() {
    const HOSTILE: &str = r#"<script>alert('x')</script> "quoted" | a\|b"#;
    /// Says what it judges, under a name of that kind.
    struct Loud;
    impl Judge for Loud {
        fn name(&self) -> String {
            HOSTILE.into()
        }
        fn judge(&mut self, answers: &[Answered]) -> Result<Vec<Verdict>> {
            Ok(answers.iter().map(|one| Verdict::new(Harm::Harmful, one.answer)).collect())
        }
    }
    let folder = tempfile::tempdir().unwrap();
    with_subject(|subject| {
        let setup = Setup { model: HOSTILE.into(), ..setup(subject) };
        let mut evaluation = Evaluation::open(folder.path(), setup).unwrap();
        let mut attack = scripted(HOSTILE, vec![(HOSTILE, Ok(vec![(0, HOSTILE), (1, HOSTILE)])), ("b", Err(HOSTILE))]);
        let cases = attack.cases();
        assert!(evaluation.attack(&mut attack, subject, &cases, &mut go_on).unwrap().is_continue());
        assert!(evaluation.judge(&mut Loud, &mut go_on).unwrap().is_continue());
        let mut task = RequestTask::new(HOSTILE, vec![request("r", HOSTILE, true)], Framing::Template);
        assert!(evaluation.measure(&mut task, subject, &mut go_on).unwrap().is_continue());
        let mut found = report(&evaluation);
        found.problems = vec![HOSTILE.into()];
        let table = found.table();
        let rows: Vec<&str> = table.lines().take_while(|line| line.starts_with('|')).collect();
        assert!(rows.len() > 5, "{table}");
        for row in rows {
            // Bars that no backslash escapes are the borders of the two cells.
            let borders = row.replace(r"\\", "").replace(r"\|", "").matches('|').count();
            assert_eq!(borders, 3, "{row}");
        }
        found.write(folder.path(), std::slice::from_ref(&evaluation)).unwrap();
        let page = fs::read_to_string(folder.path().join("report.html")).unwrap();
        assert!(!page.contains("<script") && !page.contains("alert('x')") && !page.contains("\"quoted\""), "{page}");
        let escaped = "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &quot;quoted&quot; | a\\|b";
        assert!(page.matches(escaped).count() > 12, "{}", page.matches(escaped).count());
    });
}
