//! Tokenizers and their templates against ids that transformers computed from the same folders.

use std::{fs, path::PathBuf};

use advtrain::{ChatFormat, Message, Turns};
use serde::Deserialize;

#[derive(Deserialize)]
struct Expected {
    chats: Vec<Chat>,
    texts: Vec<Text>,
}

#[derive(Deserialize)]
struct Chat {
    messages: Vec<Message>,
    add_generation_prompt: bool,
    text: String,
    ids: Vec<i64>,
}

#[derive(Deserialize)]
struct Text {
    text: String,
    ids: Vec<i64>,
    ids_with_special: Vec<i64>,
    decoded: String,
    decoded_skipping_special: String,
}

fn fixtures() -> Vec<(ChatFormat, Expected)> {
    let load = |name: &str| {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
        let expected = fs::read_to_string(folder.join("expected.json")).unwrap();
        (ChatFormat::load(&folder).unwrap(), serde_json::from_str(&expected).unwrap())
    };
    ["tokenizer", "tokenizer_sp"].map(load).into()
}

#[test]
fn texts_become_the_same_ids_and_back() {
    for (format, expected) in fixtures() {
        let tokenizer = format.tokenizer();
        for record in expected.texts {
            assert_eq!(tokenizer.encode(&record.text).unwrap(), record.ids, "{:?}", record.text);
            let decode = |skip| tokenizer.decode(&record.ids_with_special, skip).unwrap();
            assert_eq!(decode(false), record.decoded);
            assert_eq!(decode(true), record.decoded_skipping_special);
        }
    }
}

#[test]
fn conversations_become_the_same_ids() {
    for (format, expected) in fixtures() {
        for chat in expected.chats {
            assert_eq!(format.template().render(&chat.messages, chat.add_generation_prompt).unwrap(), chat.text);
            assert_eq!(format.tokenizer().encode(&chat.text).unwrap(), chat.ids);
            if chat.add_generation_prompt {
                assert_eq!(format.prompt(&chat.messages).unwrap().ids(), chat.ids);
            }
        }
    }
}

/// Prompt and continuation are the conversation, up to the last answer's end-of-turn token.
#[test]
fn prompts_and_continuations_are_the_conversation() {
    let mut answered = 0;
    for (format, expected) in fixtures() {
        let end = format.end_of_turn().unwrap();
        for chat in
            expected.chats.iter().filter(|chat| chat.messages.last().is_some_and(|last| last.role == "assistant"))
        {
            for turns in [Turns::All, Turns::Last] {
                let encoded = format.chat(&chat.messages, turns).unwrap();
                assert!(!encoded.boundary_merged);
                let mut ids = encoded.prompt.ids().to_vec();
                ids.extend(encoded.continuation.ids());
                let last = chat.ids.iter().rposition(|id| *id == end).unwrap();
                assert_eq!(ids, chat.ids[..=last], "{}", chat.text);
                answered += 1;
            }
        }
    }
    assert!(answered > 4, "{answered}");
}
