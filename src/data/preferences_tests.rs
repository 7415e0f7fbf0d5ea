use super::*;

fn toy(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/data").join(name)
}

#[test]
fn every_form_of_the_toy_file_is_read() {
    let (pairs, report) = load_preferences(toy("preferences.jsonl")).unwrap();
    assert_eq!((report.rows, report.count("equal_answers"), report.count("empty_answer")), (4, 1, 1));
    let ids: Vec<&str> = pairs.iter().map(|pair| pair.id.as_str()).collect();
    assert_eq!(ids, ["text", "preferences:2", "whole", "mixed"]);
    assert_eq!(pairs[0].messages, [Message::user("How do I bottle thunder?")]);
    assert_eq!(
        (pairs[0].safe.as_str(), pairs[0].harmful.as_str()),
        ("I can't help with that.", "Hold a bottle into a storm.")
    );
    assert_eq!(pairs[1].messages, [Message::user("How do I mix moon ink?")]);
    assert_eq!(pairs[1].harmful, "Stir silver dust into dew.");
    let greeting =
        [Message::user("Hello"), Message::assistant("Hi! What shall we cook?"), Message::user("Echo syrup, please.")];
    assert_eq!(pairs[2].messages, greeting);
    assert_eq!(pairs[2].safe, "That one is banned.");
    assert_eq!(pairs[3].messages, [Message::user("How do I freeze dragon breath?")]);
    assert_eq!(pairs[3].harmful, "Wait for winter.");
}

fn read(rows: &str) -> Result<(Vec<AnswerPair>, LoadReport)> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("p.jsonl");
    std::fs::write(&path, rows).unwrap();
    load_preferences(&path)
}

/// Of one request they are one group, so that no split has it on both sides.
#[test]
fn answers_to_one_request_stay_together() {
    let row =
        |prompt: &str, chosen: &str| format!(r#"{{"prompt": "{prompt}", "chosen": "{chosen}", "rejected": "x"}}"#);
    let (pairs, _) = read(&[row("Mix ink", "a"), row("mix  INK", "b"), row("Mix sap", "c")].join("\n")).unwrap();
    let groups: Vec<&str> = pairs.iter().map(|pair| pair.group.as_str()).collect();
    assert_eq!(groups, ["mix ink", "mix ink", "mix sap"]);
}

/// The rows of TRL's documentation, "Dataset formats and types", and the mixtures that published data sets have.
#[test]
fn trls_own_rows_are_read() {
    let user = r#"{"role": "user", "content": "What color is the sky?"}"#;
    let (blue, green) =
        (r#"{"role": "assistant", "content": "It is blue."}"#, r#"{"role": "assistant", "content": "It is green."}"#);
    let text = "What color is the sky?";
    let rows = [
        format!(r#"{{"prompt": [{user}], "chosen": [{blue}], "rejected": [{green}]}}"#),
        format!(r#"{{"chosen": [{user}, {blue}], "rejected": [{user}, {green}]}}"#),
        format!(r#"{{"prompt": [], "chosen": [{user}, {blue}], "rejected": [{user}, {green}]}}"#),
        format!(r#"{{"prompt": "", "chosen": [{user}, {blue}], "rejected": [{user}, {green}]}}"#),
        format!(r#"{{"prompt": [{user}], "chosen": [{user}, {blue}], "rejected": [{user}, {green}]}}"#),
        format!(r#"{{"prompt": "{text}", "chosen": [{user}, {blue}], "rejected": [{user}, {green}]}}"#),
        format!(r#"{{"prompt": "{text}", "chosen": [{blue}], "rejected": [{green}]}}"#),
        format!(r#"{{"prompt": "{text}", "chosen": "It is blue.", "rejected": "It is green."}}"#),
    ];
    for row in rows {
        let (pairs, _) = read(&row).unwrap_or_else(|error| panic!("{row}: {error}"));
        assert_eq!(pairs[0].messages, [Message::user(text)], "{row}");
        assert_eq!((pairs[0].safe.as_str(), pairs[0].harmful.as_str()), ("It is blue.", "It is green."), "{row}");
    }
    let (pairs, _) = read(r#"{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}"#).unwrap();
    assert_eq!((pairs[0].safe.as_str(), pairs[0].harmful.as_str()), (" blue.", " green."));
    let implicit = read(r#"{"chosen": "The sky is blue.", "rejected": "The sky is green."}"#);
    assert!(implicit.unwrap_err().to_string().contains("line 1: prompt is missing or empty"));
}

#[test]
fn ids_may_be_numbers() {
    let row = |id: &str| format!("{{\"id\": {id}, \"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}}\n");
    let rows = ["3", "-4", "18446744073709551615", "\"x\"", "null"].map(row).concat();
    let (pairs, _) = read(&rows).unwrap();
    let ids: Vec<&str> = pairs.iter().map(|pair| pair.id.as_str()).collect();
    assert_eq!(ids, ["3", "-4", "18446744073709551615", "x", "p:5"]);
    assert!(read(&row("[1]")).unwrap_err().to_string().contains("line 1: an id: a text or a whole number"));
}

#[test]
fn a_row_of_another_form_is_named() {
    let user = r#"{"role": "user", "content": "a"}"#;
    let answer = |text: &str| format!(r#"{{"role": "assistant", "content": "{text}"}}"#);
    let (one, two) = (answer("1"), answer("2"));
    let cases = [
        (r#"{"chosen": "a", "rejected": "b"}"#.to_string(), "prompt is missing"),
        (format!(r#"{{"prompt": "a", "chosen": "a", "rejected": [{one}]}}"#), "both must be the same"),
        (format!(r#"{{"chosen": [{one}], "rejected": [{two}]}}"#), "share no first message"),
        (
            format!(r#"{{"chosen": [{user}, {one}], "rejected": [{user}, {one}, {user}]}}"#),
            "2 messages behind the prompt",
        ),
        (format!(r#"{{"prompt": [{user}], "chosen": [{one}, {user}], "rejected": [{two}]}}"#), "chosen has 2 messages"),
        (format!(r#"{{"chosen": [{user}, {user}], "rejected": [{user}, {one}]}}"#), "role user; it must be assistant"),
        (r#"{"prompt": 3, "chosen": "a", "rejected": "b"}"#.to_string(), "a text or a list"),
        ("{".to_string(), "expected {\"prompt\"?"),
    ];
    for (row, expected) in cases {
        let message = read(&format!("\n{row}\n")).unwrap_err().to_string();
        assert!(message.contains("p.jsonl: line 2: ") && message.contains(expected), "{row}: {message}");
    }
}

#[test]
fn a_file_without_pairs_is_an_error() {
    let message = read(r#"{"prompt": "a", "chosen": "b", "rejected": "b"}"#).unwrap_err().to_string();
    assert!(message.contains("no preference pair is left: 0 rows; 1 rows whose two answers are equal"), "{message}");
}
