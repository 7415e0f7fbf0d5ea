use std::path::PathBuf;

use super::super::{
    BehaviorFiles, ChatReader, ChatTemplate, SpecialTokens, load_behavior_pairs, test_tokenizers::byte_level,
};
use super::*;

fn toy(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/data").join(name)
}

/// `U` and `A` and `.` are one token each, and every letter is one.
fn format() -> ChatFormat {
    let source = "{% for m in messages %}{{ ('<A>' if m.role == 'assistant' else '<U>') + m.content + '<.>' }}{% endfor %}\
        {% if add_generation_prompt %}<A>{% endif %}";
    let template = ChatTemplate::from_source(source, &SpecialTokens::default()).unwrap();
    ChatFormat::new(byte_level(&[], &["<U>", "<A>", "<.>"]), template).unwrap()
}

fn pair(id: &str, request: &str, harmful: &str, safe: &str) -> AnswerPair {
    AnswerPair {
        id: id.into(),
        group: id.into(),
        place: format!("f line {}", request.len()),
        messages: vec![Message::user(request)],
        harmful: harmful.into(),
        harmful_ends: true,
        safe: safe.into(),
        hash_check: false,
        functional_category: None,
    }
}

fn chat(id: &str, texts: &[&str]) -> Result<Chat> {
    let message = |(index, text): (usize, &&str)| Message::new(["user", "assistant"][index % 2], *text);
    Ok(Chat { id: id.into(), place: "c".into(), messages: texts.iter().enumerate().map(message).collect() })
}

#[test]
fn the_toy_behaviours_become_examples() {
    let files = BehaviorFiles { behaviors: toy("behaviors.csv"), targets: toy("targets.json"), safe_responses: None };
    let (pairs, loaded) = load_behavior_pairs(&files).unwrap();
    let (examples, report) = encode_pairs(&format(), &pairs, 256).unwrap();
    assert_eq!((examples.len(), report.rows), (16, 16));
    assert!(report.notes.is_empty(), "{report}");
    for (example, pair) in examples.iter().zip(&pairs) {
        assert_eq!(example.id(), pair.id);
        let kinds: Vec<_> = example.continuations().iter().map(|continuation| continuation.kind).collect();
        assert_eq!(kinds, [ContinuationKind::Harmful, ContinuationKind::Safe]);
        // One token per byte, and the end of turn behind the safe answer alone: the harmful one is a beginning.
        let targets: Vec<usize> = example.continuations().iter().map(|one| one.tokens.targets()).collect();
        assert_eq!(targets, [pair.harmful.len(), pair.safe.len() + 1]);
        assert_eq!(example.prompt().len(), pair.messages[0].content.len() + 3);
    }
    assert_eq!(loaded.then(report).count("empty_target"), 2);
}

#[test]
fn answers_are_cut_to_the_limit_and_counted() {
    let (examples, report) = encode_pairs(&format(), &[pair("a", "xx", "12345", "1")], 8).unwrap();
    let lengths: Vec<usize> =
        examples[0].continuations().iter().map(|continuation| continuation.tokens.len()).collect();
    assert_eq!((examples[0].prompt().len(), lengths), (5, vec![3, 2]));
    assert_eq!((report.count("harmful_truncated"), report.count("safe_truncated")), (1, 0));
}

#[test]
fn pairs_that_cannot_be_used_are_errors() {
    let encode = |pairs: &[AnswerPair], limit| encode_pairs(&format(), pairs, limit).unwrap_err().to_string();
    let message = encode(&[pair("a", "xx", "1", "2")], 5);
    assert_eq!(
        message,
        "while encoding the row a of f line 2: example a: its prompt has 5 tokens and leaves no room for an answer within \
         max_tokens = 5"
    );
    for (harmful, safe, which) in [(" \n", "2", "harmful"), ("1", "", "safe")] {
        let message = encode(&[pair("a", "x", "1", "2"), pair("b", "xx", harmful, safe)], 9);
        assert!(message.ends_with(&format!("f line 2: example b: its {which} answer is empty; it must hold a text")));
    }
    let message = encode(&[pair("a", "x", "1", "2"), pair("a", "xx", "1", "2")], 9);
    assert_eq!(message, "example a: is there twice: f line 1, and f line 2; ids must be unique");
    assert!(encode(&[], 9).contains("expected at least one that can be used, found 0 rows"));
    assert!(encode(&[], 1).starts_with("max_tokens = 1: must be at least 2"));
}

#[test]
fn a_prompt_that_depends_on_the_answer_is_an_error() {
    let source = "{{ '<U>' ~ messages[0].content }}{% if messages[1] %}{{ '!' if messages[1].content | length > 9 }}\
        <A>{{ messages[1].content }}{% elif add_generation_prompt %}?{% endif %}";
    let template = ChatTemplate::from_source(source, &SpecialTokens::default()).unwrap();
    let format = ChatFormat::new(byte_level(&[], &["<U>", "<A>"]), template).unwrap();
    let message = encode_pairs(&format, &[pair("a", "x", "1234567890", "1")], 99).unwrap_err().to_string();
    // <U> x ! <A> and <U> x <A>.
    assert!(
        message.contains("example a: the prompts of its continuations differ (4 tokens and 3 tokens)"),
        "{message}"
    );
    assert!(message.contains("of f line 1, on which the template lets the prompt depend"), "{message}");
}

#[test]
fn chats_without_a_token_of_prompt_are_counted() {
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}";
    let template = ChatTemplate::from_source(template, &SpecialTokens::default()).unwrap();
    let format = ChatFormat::new(byte_level(&[], &[]), template).unwrap();
    let (examples, report) =
        encode_chats(&format, [chat("a", &["", "1"]), chat("b", &["x", "1"])], 9, Turns::All).unwrap();
    assert_eq!((examples.len(), examples[0].id(), report.count("no_prompt")), (1, "b", 1));
}

/// As [`format`], for users and assistants alone.
fn refusing() -> ChatFormat {
    let source = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}\
        {{ ('<A>' if m.role == 'assistant' else '<U>') + m.content.split('|')[-1] + '<.>' }}{% endfor %}\
        {% if add_generation_prompt %}<A>{% endif %}";
    let template = ChatTemplate::from_source(source, &SpecialTokens::default()).unwrap();
    ChatFormat::new(byte_level(&[], &["<U>", "<A>", "<.>"]), template).unwrap()
}

#[test]
fn what_the_template_does_not_take_is_counted() {
    let led = |id: &str| {
        let messages = vec![Message::system("s"), Message::user("x"), Message::assistant("1")];
        Chat { id: id.into(), place: "c".into(), messages }
    };
    let chats = || [Ok(led("a")), chat("b", &["x", "1"]), chat("c", &["x", "1|2"]), Ok(led("d"))];
    let (examples, report) = encode_chats(&refusing(), chats(), 99, Turns::All).unwrap();
    assert_eq!((examples.len(), examples[0].id(), report.rows), (1, "b", 1));
    let note = report.notes.iter().find(|note| note.name == "refused").unwrap();
    assert_eq!((note.count, note.first.clone()), (3, vec!["a".into(), "c".into(), "d".into()]));
    assert!(note.what.contains("the template refuses the conversation: no system turn"), "{}", note.what);
    let message = encode_chats(&refusing(), [Ok(led("a"))], 99, Turns::Last).unwrap_err().to_string();
    assert!(message.contains("found 0 rows; 1 rows left out") && message.contains("no system turn"), "{message}");

    let led = AnswerPair { messages: led("a").messages, ..pair("a", "x", "1", "2") };
    let (examples, report) = encode_pairs(&refusing(), &[led.clone(), pair("b", "x", "1", "2")], 99).unwrap();
    assert_eq!((examples.len(), examples[0].id(), report.count("refused")), (1, "b", 1));
    assert!(encode_pairs(&refusing(), &[led], 99).unwrap_err().to_string().contains("no system turn"));
}

/// The tags mark what stands behind the lead `##########` of an answer, and nothing of a short one.
#[test]
fn chats_without_a_target_in_the_limit_are_counted() {
    let source = "{% for m in messages %}{% if m.role == 'assistant' %}<A>##########\
        {% if m.content | length > 1 %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\
        {% else %}<U>{{ m.content }}{% endif %}<.>{% endfor %}{% if add_generation_prompt %}<A>{% endif %}";
    let template = ChatTemplate::from_source(source, &SpecialTokens::default()).unwrap();
    let format = ChatFormat::new(byte_level(&[], &["<U>", "<A>", "<.>"]), template).unwrap();
    let chats = || [chat("a", &["x", "12"]), chat("b", &["x", "1"]), chat("c", &["xx", "12"])];
    // <U> x <.> <A> and the lead are 14 tokens.
    for turns in [Turns::All, Turns::Last] {
        let (examples, report) = encode_chats(&format, chats(), 15, turns).unwrap();
        assert_eq!((examples.len(), examples[0].len(), examples[0].continuations()[0].tokens.targets()), (1, 15, 1));
        assert_eq!((report.count("no_target"), report.count("utility_truncated")), (2, 1));
    }
    let (examples, _) = encode_chats(&format, chats(), 16, Turns::All).unwrap();
    assert_eq!(examples.iter().map(Example::id).collect::<Vec<_>>(), ["a", "c"]);
}

#[test]
fn the_toy_chats_become_examples() {
    let chats = || ChatReader::open(toy("chats.jsonl")).unwrap();
    let (examples, report) = encode_chats(&format(), chats(), 1000, Turns::All).unwrap();
    assert_eq!((examples.len(), report.count("empty_answer")), (8, 1));
    assert_eq!(examples[2].id(), "chats:3");
    let tea = examples.iter().find(|example| example.id() == "tea_2").unwrap();
    let answers = ["About five minutes.", "Ten minutes, covered.", "A spoon of honey."];
    let utility = &tea.continuation(ContinuationKind::Utility).unwrap().tokens;
    assert_eq!(utility.targets(), answers.iter().map(|answer| answer.len() + 1).sum::<usize>());
    let (last, _) = encode_chats(&format(), chats(), 1000, Turns::Last).unwrap();
    let tea = last.iter().find(|example| example.id() == "tea_2").unwrap();
    assert_eq!(tea.continuations()[0].tokens.targets(), answers[2].len() + 1);
}

#[test]
fn long_chats_are_cut_or_left_out() {
    let chats = || [chat("a", &["xx", "1", "yyyyy", "22"]), chat("b", &["xxxxxxxxxxxx", "1"])];
    let (examples, report) = encode_chats(&format(), chats(), 12, Turns::All).unwrap();
    // 5 tokens of prompt, 2 of the first answer; the user's second message is not worth reading without an answer.
    assert_eq!((examples.len(), examples[0].len()), (1, 7));
    assert_eq!((report.count("no_target"), report.count("utility_truncated")), (1, 1));
    let (examples, report) = encode_chats(&format(), chats(), 12, Turns::Last).unwrap();
    assert_eq!((examples[0].prompt().len(), examples[0].len()), (5, 7));
    assert_eq!(report.count("utility_truncated"), 0);
    let (examples, _) = encode_chats(&format(), chats(), 17, Turns::Last).unwrap();
    assert_eq!((examples[0].prompt().len(), examples[0].len()), (15, 17));
}

#[test]
fn chats_that_teach_nothing_are_counted() {
    let chats = [chat("a", &["x"]), chat("b", &["x", " "]), chat("c", &["x", "1", "y"]), chat("d", &[])];
    let (examples, report) = encode_chats(&format(), chats, 99, Turns::All).unwrap();
    assert_eq!((examples.len(), report.count("no_answer"), report.count("empty_answer")), (1, 2, 1));
    let message = encode_chats(&format(), [chat("a", &["x"])], 99, Turns::All).unwrap_err().to_string();
    assert!(message.contains("found 0 rows; 1 conversations without a prompt"), "{message}");
    let twice = [chat("a", &["x", "y"]), chat("a", &["x", "y"])];
    assert!(encode_chats(&format(), twice, 99, Turns::All).unwrap_err().to_string().contains("is there twice"));
}
