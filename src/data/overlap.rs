//! Rows that stand in both of two sets which must have none in common.

use std::collections::HashSet;

use super::{AnswerPair, Chat, Message};

/// The ids of the validation pairs that also stand in the training set, in their order: those of a [`AnswerPair::group`]
/// that is there too (the same behaviour), and those with the same users' messages, whatever the case and the white space.
/// Answers are not compared. A group that was made of the file's name and the line says nothing and does not count.
pub fn overlapping_pairs(training: &[AnswerPair], validation: &[AnswerPair]) -> Vec<String> {
    overlap(training.iter().map(Row::from), validation.iter().map(Row::from))
}

/// The ids of the validation chats that also stand in the training set, in their order: by id or by the users' messages, as
/// for [`overlapping_pairs`].
pub fn overlapping_chats(training: &[Chat], validation: &[Chat]) -> Vec<String> {
    overlap(training.iter().map(Row::from), validation.iter().map(Row::from))
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

    /// The words of the users; none if there is no word.
    fn words(&self) -> Option<Vec<String>> {
        let users = self.messages.iter().filter(|message| message.is_user());
        let words: Vec<String> =
            users.flat_map(|message| message.content.split_whitespace()).map(str::to_lowercase).collect();
        Some(words).filter(|words| !words.is_empty())
    }
}

fn overlap<'a>(training: impl Iterator<Item = Row<'a>>, validation: impl Iterator<Item = Row<'a>>) -> Vec<String> {
    let (mut names, mut texts) = (HashSet::new(), HashSet::new());
    for row in training {
        names.extend(row.own_name());
        texts.extend(row.words());
    }
    let is_there = |row: &Row<'a>| {
        row.own_name().is_some_and(|name| names.contains(name))
            || row.words().is_some_and(|words| texts.contains(&words))
    };
    validation.filter(is_there).map(|row| row.id.to_string()).collect()
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
            safe: "no".into(),
            hash_check: false,
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
        assert_eq!(overlapping_pairs(&training, &validation), ["boil/7", "ink_2/0"]);
        assert!(overlapping_pairs(&training, &validation[3..]).is_empty());
        assert!(overlapping_pairs(&[], &validation).is_empty());
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
        assert_eq!(overlapping_chats(&training, &validation), ["p", "q", "t"]);
    }
}
