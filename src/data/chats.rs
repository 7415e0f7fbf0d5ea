//! Harmless conversations in UltraChat's JSONL form.

use std::path::Path;

use serde::Deserialize;
use serde_json::json;

use super::{
    Chat, Message,
    json_objects::{Id, JsonObjects},
};
use crate::{Result, files};

const FORM: &str = r#"{"prompt_id"?: text or whole number, "messages": [{"role": text, "content": text}, …]}"#;

#[derive(Debug, Deserialize)]
struct Line {
    prompt_id: Option<Id>,
    messages: Vec<Message>,
}

/// The conversations of a JSONL file, read one by one: data sets of this form are larger than a memory.
///
/// A line is `{"messages": [{"role", "content"}, …]}`, with a `prompt_id` (a text or a whole number) or else the id
/// `file stem:line`. Other fields,
/// such as UltraChat's `prompt` which repeats the first message, are ignored.
#[derive(Debug)]
pub struct ChatReader(JsonObjects<Line>);

impl ChatReader {
    /// Opens a file.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Ok(Self(JsonObjects::open(path.as_ref(), FORM)?))
    }
}

impl Iterator for ChatReader {
    /// A conversation, or an error that names the line.
    type Item = Result<Chat>;

    fn next(&mut self) -> Option<Self::Item> {
        let line = self.0.next()?;
        Some(line.map(|(line, chat)| Chat {
            id: self.0.id(chat.prompt_id, line),
            place: self.0.place(line),
            messages: chat.messages,
        }))
    }
}

/// Writes conversations as [`ChatReader`] reads them.
///
/// # Errors
/// If the file cannot be written.
pub fn save_chats(path: impl AsRef<Path>, chats: &[Chat]) -> Result<()> {
    let line = |chat: &Chat| format!("{}\n", json!({ "prompt_id": chat.id, "messages": chat.messages }));
    files::write(path.as_ref(), chats.iter().map(line).collect::<String>().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Vec<Result<Chat>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("chats.jsonl");
        std::fs::write(&path, text).unwrap();
        ChatReader::open(&path).unwrap().collect()
    }

    #[test]
    fn ids_are_given_or_made_of_the_line() {
        let text = r#"{"prompt": "a", "prompt_id": "p", "messages": [{"role": "user", "content": "a"}]}

{"messages": []}
{"prompt_id": 7, "messages": []}
{"prompt_id": null, "messages": []}
"#;
        let chats: Vec<Chat> = read(text).into_iter().map(Result::unwrap).collect();
        assert_eq!(chats[0].id, "p");
        assert_eq!(chats[0].messages, [Message::user("a")]);
        assert_eq!(chats[1].id, "chats:3");
        assert!(chats[1].place.ends_with("chats.jsonl line 3"));
        assert_eq!((chats[2].id.as_str(), chats[3].id.as_str()), ("7", "chats:5"));
    }

    #[test]
    fn what_is_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("own.jsonl");
        let messages = vec![Message::user("a \"b\"\n"), Message::new("assistant", "c")];
        save_chats(&path, &[Chat { id: "7".into(), place: "x".into(), messages: messages.clone() }]).unwrap();
        let read: Vec<Chat> = ChatReader::open(&path).unwrap().map(Result::unwrap).collect();
        let place = read[0].place.clone();
        assert_eq!(read, [Chat { id: "7".into(), place, messages }]);
    }

    #[test]
    fn a_broken_line_is_named() {
        let rows = read("{\"messages\": []}\n{\"messages\": [{\"role\": \"user\"}]}\n");
        let message = rows[1].as_ref().unwrap_err().to_string();
        assert!(message.contains("chats.jsonl: line 2: missing field `content`"), "{message}");
        assert!(message.contains("expected {\"prompt_id\"?: text"), "{message}");
        let rows = read(r#"{"prompt_id": 1.5, "messages": []}"#);
        let message = rows[0].as_ref().unwrap_err().to_string();
        assert!(message.contains("line 1: an id: a text or a whole number at column 17"), "{message}");
    }
}
