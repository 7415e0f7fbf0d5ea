use std::fs;

use super::*;

fn toy(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/data").join(name)
}

fn toy_files() -> BehaviorFiles {
    BehaviorFiles {
        behaviors: toy("behaviors.csv"),
        targets: toy("targets.json"),
        safe_responses: Some(toy("safe_responses.csv")),
    }
}

fn written(name: &str, text: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, text).unwrap();
    (folder, path)
}

/// The counts are those of the toy files, counted by hand: 12 behaviours, of which one has no targets; 18 targets with a
/// behaviour and one without; one of them is empty and one blank.
#[test]
fn the_toy_set_is_joined_and_counted() {
    let (pairs, report) = load_behavior_pairs(&toy_files()).unwrap();
    assert_eq!((pairs.len(), report.rows), (16, 16));
    assert_eq!(report.count("empty_target"), 2);
    assert_eq!(report.count("behavior_without_targets"), 1);
    assert_eq!(report.count("targets_without_behavior"), 1);
    assert_eq!(report.count("default_safe_response"), 1);
    assert_eq!(report.count("hash_check"), 1);
    let named = |name: &str| report.notes.iter().find(|note| note.name == name).unwrap().first.clone();
    assert_eq!(named("empty_target"), ["boil_echo_syrup/1", "whisk_levity_foam/1"]);
    assert_eq!(named("behavior_without_targets"), ["forge_frog_permit"]);
    assert_eq!(named("targets_without_behavior"), ["summon_soup_spoon"]);
    let thunder: Vec<_> = pairs.iter().filter(|pair| pair.group == "bottle_thunder").collect();
    assert_eq!(thunder[1].id, "bottle_thunder/1");
    assert_eq!(thunder[1].harmful, "Step 1: find a storm. Step 2: ask it nicely.");
    assert_eq!(thunder[1].safe, DEFAULT_SAFE_RESPONSE);
    assert!(thunder[1].place.ends_with("behaviors.csv line 5"), "{}", thunder[1].place);
    let soup = pairs.iter().find(|pair| pair.id == "stir_memory_soup/0").unwrap();
    let request = "The old cookbook says: soup remembers,\nand it must never be stirred against the sun.\n\n---\n\n\
                   Describe how to stir memory soup anticlockwise";
    assert_eq!(soup.messages, [Message::user(request)]);
    assert!(pairs.iter().all(|pair| pair.hash_check == (pair.group == "copy_song_of_kettles")));
}

#[test]
fn safe_responses_are_optional() {
    let (pairs, report) = load_behavior_pairs(&BehaviorFiles { safe_responses: None, ..toy_files() }).unwrap();
    assert!(pairs.iter().all(|pair| pair.safe == "Sorry, I can't do that."));
    assert_eq!(report.count("default_safe_response"), 0);
}

#[test]
fn columns_may_be_few_and_must_be_there() {
    let (_folder, path) = written("b.csv", "BehaviorID,Behavior\na,Do a\n");
    let behaviors = load_behaviors(&path).unwrap();
    assert_eq!((behaviors[0].context.clone(), behaviors[0].tags.len(), behaviors[0].line), (None, 0, 2));
    assert_eq!(behaviors[0].request(), "Do a");
    let (_folder, path) = written("b.csv", "Behavior,Category\na,b\n");
    let message = load_behaviors(&path).unwrap_err().to_string();
    assert!(message.ends_with("b.csv: has no column BehaviorID; found Behavior, Category"), "{message}");
}

#[test]
fn bad_rows_are_named_by_line() {
    for (text, expected) in [
        ("Behavior,BehaviorID\nx,a\ny,b\nz,a\n", "lines 2 and 4 have the same BehaviorID a"),
        ("Behavior,BehaviorID\nx,a\n,b\n", "line 3: Behavior is empty"),
        ("Behavior,BehaviorID\n", "holds no behaviour"),
    ] {
        let (_folder, path) = written("b.csv", text);
        let message = load_behaviors(&path).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn targets_are_a_text_or_a_list_and_no_id_repeats() {
    let (_folder, path) = written("t.json", r#"{"b": "one", "a": ["x", ""]}"#);
    let targets = load_targets(&path).unwrap();
    assert_eq!(targets, [("b".into(), vec!["one".into()]), ("a".into(), vec!["x".into(), String::new()])]);
    for (text, expected) in [
        (r#"{"a": "x", "a": "y"}"#, "the id a occurs twice"),
        (r#"{"a": 3}"#, "a text or a list of texts"),
        ("[]", "an object from behaviour ids"),
    ] {
        let (_folder, path) = written("t.json", text);
        let message = load_targets(&path).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn no_row_at_all_is_an_error() {
    let (_folder, targets) = written("t.json", r#"{"bottle_thunder": [""], "unknown": ["x"]}"#);
    let message = load_behavior_pairs(&BehaviorFiles { targets, ..toy_files() }).unwrap_err().to_string();
    assert!(
        message.contains("no row is left") && message.contains("1 empty targets skipped (bottle_thunder/0)"),
        "{message}"
    );
}
