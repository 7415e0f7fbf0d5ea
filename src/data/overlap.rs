//! Rows that stand in both of two sets which must have none in common.

use std::collections::HashMap;

use super::{AnswerPair, Chat, Message};

/// Rows to look others up in: one set of two that must have none in common. The other can be read row by row.
///
/// Two rows are the same if they share a name of their own (a pair's [`AnswerPair::group`], which is its behaviour; a chat's
/// id), or if the users' messages are the same, whatever the case and the white space. Answers are not compared. A name that
/// was made of the file's name and the line says nothing and does not count.
///
/// ```
/// use advtrain::{AnswerPair, Message, RowIndex};
///
/// let pair = |id: &str, request: &str| AnswerPair {
///     id: id.into(), group: id.into(), place: "a.csv line 2".into(), messages: vec![Message::user(request)],
///     harmful: "Sure".into(), harmful_ends: false, safe: "Sorry".into(), hash_check: false,
///     functional_category: None,
/// };
/// let validation = RowIndex::of_pairs(&[pair("ink", "Mix moon ink")]);
/// assert_eq!(validation.find_pair(&pair("other", "mix  moon INK")), Some("ink"));
/// assert_eq!(validation.find_pair(&pair("other", "Mix sun ink")), None);
/// ```
#[derive(Clone, Debug, Default)]
pub struct RowIndex {
    /// The id of the first row with each name.
    names: HashMap<String, String>,
    /// The id of the first row with each users' text, as words.
    texts: HashMap<Vec<String>, String>,
}

impl RowIndex {
    /// An index of these pairs.
    pub fn of_pairs(pairs: &[AnswerPair]) -> Self {
        Self::of(pairs.iter().map(Row::from))
    }

    /// An index of these chats.
    pub fn of_chats(chats: &[Chat]) -> Self {
        Self::of(chats.iter().map(Row::from))
    }

    /// The id of the indexed row that is the same as this pair.
    pub fn find_pair(&self, pair: &AnswerPair) -> Option<&str> {
        self.find(&pair.into())
    }

    /// The id of the indexed row that is the same as this chat.
    pub fn find_chat(&self, chat: &Chat) -> Option<&str> {
        self.find(&chat.into())
    }

    fn of<'a>(rows: impl Iterator<Item = Row<'a>>) -> Self {
        let mut index = Self::default();
        for row in rows {
            if let Some(name) = row.own_name() {
                index.names.entry(name.to_string()).or_insert_with(|| row.id.to_string());
            }
            if let Some(words) = users_words(row.messages) {
                index.texts.entry(words).or_insert_with(|| row.id.to_string());
            }
        }
        index
    }

    fn find(&self, row: &Row) -> Option<&str> {
        let by_name = row.own_name().and_then(|name| self.names.get(name));
        by_name.or_else(|| self.texts.get(&users_words(row.messages)?)).map(String::as_str)
    }
}

struct Row<'a> {
    id: &'a str,
    /// What makes two rows the same, whatever their text.
    name: &'a str,
    place: &'a str,
    messages: &'a [Message],
}

impl<'a> From<&'a AnswerPair> for Row<'a> {
    fn from(pair: &'a AnswerPair) -> Self {
        Self { id: &pair.id, name: &pair.group, place: &pair.place, messages: &pair.messages }
    }
}

impl<'a> From<&'a Chat> for Row<'a> {
    fn from(chat: &'a Chat) -> Self {
        Self { id: &chat.id, name: &chat.id, place: &chat.place, messages: &chat.messages }
    }
}

impl<'a> Row<'a> {
    /// None for a name that stands for a line of a file, as `chats:7` for the place `…/chats.jsonl line 7`.
    fn own_name(&self) -> Option<&'a str> {
        let line = self.place.rsplit_once(" line ").map(|(_, line)| line);
        let named = self.name.rsplit_once(':').map(|(_, line)| line);
        Some(self.name).filter(|_| named.is_none() || named != line)
    }
}

/// The words of the users, in lower case; none if there is no word.
pub(super) fn users_words(messages: &[Message]) -> Option<Vec<String>> {
    let users = messages.iter().filter(|message| message.is_user());
    let words: Vec<String> =
        users.flat_map(|message| message.content.split_whitespace()).map(str::to_lowercase).collect();
    Some(words).filter(|words| !words.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(id: &str, request: &str) -> AnswerPair {
        AnswerPair {
            id: id.into(),
            group: id.split('/').next().unwrap().into(),
            place: "a.csv line 2".into(),
            messages: vec![Message::user(request)],
            harmful: format!("yes, {id}"),
            harmful_ends: false,
            safe: "no".into(),
            hash_check: false,
            functional_category: None,
        }
    }

    #[test]
    fn pairs_overlap_by_behaviour_or_request() {
        let training = [pair("boil/0", "Boil an echo"), pair("boil/1", "Boil an echo"), pair("ink/0", "Mix moon ink")];
        let validation = [
            pair("frog/0", "Forge a permit"),
            pair("boil/7", "Another text"),
            pair("ink_2/0", "  mix\n MOON ink "),
            pair("ink_2/1", "Mix moon inks"),
            pair("INK/1", "x"),
        ];
        let found =
            |index: &RowIndex| validation.iter().map(|pair| index.find_pair(pair).map(str::to_string)).collect();
        let found: [Vec<Option<String>>; 2] = [&RowIndex::of_pairs(&training), &RowIndex::default()].map(found);
        let same = |id: &str| Some(id.to_string());
        assert_eq!(found[0], [None, same("boil/0"), same("ink/0"), None, None]);
        assert_eq!(found[1], [None, None, None, None, None]);
    }

    #[test]
    fn chats_overlap_by_their_own_id_or_what_users_say() {
        let chat = |id: &str, line: usize, texts: &[&str]| Chat {
            id: id.into(),
            place: format!("/x/chats.jsonl line {line}"),
            messages: texts
                .iter()
                .enumerate()
                .map(|(i, text)| Message::new(["user", "assistant"][i % 2], *text))
                .collect(),
        };
        let training =
            [chat("chats:1", 1, &["Tea?", "Yes."]), chat("p", 2, &["Rice?", "No.", "Why?"]), chat("e", 3, &[])];
        let validation = [
            chat("chats:1", 1, &["Another text"]),
            chat("p", 2, &["Bread?"]),
            chat("q", 3, &["tea?", "Another answer."]),
            chat("r", 4, &["Rice?", "No."]),
            chat("s", 5, &["", "x"]),
            chat("t", 6, &["rice?", "Maybe.", " why? "]),
        ];
        let index = RowIndex::of_chats(&training);
        let found: Vec<_> = validation.iter().map(|chat| index.find_chat(chat)).collect();
        assert_eq!(found, [None, Some("p"), Some("chats:1"), None, None, Some("p")]);
    }
}
