//! Strings put into conversations, with the two kinds of tokenizers.

use std::path::PathBuf;

use advtrain::{ChatFormat, ChatTemplate, Message, SpecialTokens, StringPlace};

fn formats() -> [(&'static str, ChatFormat); 2] {
    ["tokenizer", "tokenizer_sp"].map(|name| {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
        (name, ChatFormat::load(folder).unwrap())
    })
}

fn place() -> StringPlace {
    StringPlace::new(vec![Message::user("Tell me how")], "").unwrap()
}

#[test]
fn the_parts_make_up_the_prompt() {
    for (name, format) in formats() {
        for (string, after) in [(" ! ! !", ""), (" one two", " and three"), ("!!", ""), (" x\u{e9} y", "")] {
            let place = StringPlace::new(vec![Message::user("Tell me how")], after).unwrap();
            let placed = place.encode(&format, string).unwrap();
            let prompt = format.prompt(&place.messages(string)).unwrap();
            assert_eq!(placed.with(&placed.string), prompt.ids(), "{name}, {string:?}");
            let back = place.string_of(&format, &placed, &placed.string).unwrap();
            assert_eq!(back.as_deref(), Some(string), "{name}");
        }
    }
}

/// The tokens of two letters, where the tokenizer has one token for both, are not what their text is read as.
#[test]
fn tokens_whose_text_is_read_otherwise_have_no_string() {
    for (name, format) in formats() {
        let place = place();
        let placed = place.encode(&format, " the the").unwrap();
        let letters: Vec<i64> = (0..format.tokenizer().vocabulary_size() as i64)
            .filter(|id| format.tokenizer().decode(&[*id], false).unwrap().chars().all(|c| c.is_ascii_lowercase()))
            .filter(|id| format.tokenizer().decode(&[*id], false).unwrap().len() == 1)
            .collect();
        let mut read_otherwise = 0;
        for pair in letters.iter().flat_map(|first| letters.iter().map(move |second| [*first, *second])) {
            let found = place.string_of(&format, &placed, &pair).unwrap();
            let prompt = found.as_ref().map(|string| format.prompt(&place.messages(string)).unwrap());
            match prompt {
                Some(prompt) => assert_eq!(prompt.ids(), placed.with(&pair), "{name}, {found:?}"),
                None => read_otherwise += 1,
            }
        }
        assert!(0 < read_otherwise && read_otherwise < letters.len().pow(2), "{name}: {read_otherwise}");
    }
}

/// White space at the end of a message is the template's to trim: no string has a token for it.
#[test]
fn a_string_that_the_template_trims_is_not_read_back() {
    for (content, trims) in [("message['content']", false), ("message['content'] | trim", true)] {
        let source = format!("{{% for message in messages %}}<s>{{{{ {content} }}}}</s>{{% endfor %}}");
        let (_, format) = formats().into_iter().next().unwrap();
        let format = ChatFormat::new(
            format.tokenizer().clone(),
            ChatTemplate::from_source(source, &SpecialTokens::default()).unwrap(),
        )
        .unwrap();
        let place = place();
        let placed = place.encode(&format, " a b").unwrap();
        let space = format.tokenizer().encode(" ").unwrap();
        let longer: Vec<i64> = placed.string.iter().chain(&space).copied().collect();
        let found = place.string_of(&format, &placed, &longer).unwrap();
        assert_eq!(found.as_deref(), (!trims).then_some(" a b "), "{content}");
    }
}

/// The white space that a message begins with is the string's, if the template keeps it.
#[test]
fn a_string_can_be_the_whole_message() {
    for (name, format) in formats() {
        for before in ["", " "] {
            let place = StringPlace::new(vec![Message::user(before)], "").unwrap();
            let placed = place.encode(&format, " x x").unwrap();
            let prompt = format.prompt(&place.messages(" x x")).unwrap();
            assert_eq!(placed.with(&placed.string), prompt.ids(), "{name}");
            assert!(place.string_of(&format, &placed, &placed.string).unwrap().is_some(), "{name}, {before:?}");
        }
    }
}

#[test]
fn conversations_without_a_place_are_refused() {
    for messages in [vec![], vec![Message::user("a"), Message::assistant("b")]] {
        let error = StringPlace::new(messages, "").unwrap_err().to_string();
        assert!(error.contains("a last message of the user's"), "{error}");
    }
    for (_, format) in formats() {
        assert!(place().encode(&format, "  ").unwrap_err().to_string().contains("at least one token"));
    }
}

#[test]
fn the_beginning_of_an_answer_has_no_end() {
    for (_, format) in formats() {
        let messages = [Message::user("Tell me how")];
        let opening = format.opening(&messages, "Sure, here").unwrap();
        let answer = format.answer(&messages, "Sure, here").unwrap();
        assert_eq!(opening.prompt, answer.prompt);
        let length = opening.continuation.len();
        assert_eq!(opening.continuation.ids(), &answer.continuation.ids()[..length]);
        assert!(length < answer.continuation.len());
        assert_eq!(opening.continuation.targets(), length);
        assert_eq!(format.tokenizer().decode(opening.continuation.ids(), false).unwrap().trim(), "Sure, here");
        assert!(format.opening(&messages, " ").is_err());
    }
}
