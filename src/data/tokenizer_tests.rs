use super::super::test_tokenizers::{byte_level, sentence_piece};
use super::*;

#[test]
fn special_tokens_are_recognised_and_never_added() {
    let tokenizer = byte_level(&[("Ġ", "y")], &["<s>", "<|end|>", "</s>"]);
    let end = tokenizer.id_of("</s>").unwrap();
    assert_eq!(tokenizer.vocabulary_size(), 256 + 1 + 3);
    let ids = tokenizer.encode("x y</s>").unwrap();
    assert_eq!(ids, [tokenizer.id_of("x").unwrap(), tokenizer.id_of("Ġy").unwrap(), end]);
    assert!(tokenizer.is_special(end) && !tokenizer.is_special(ids[0]) && !tokenizer.is_special(-1));
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "x y</s>");
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "x y");
    assert_eq!((tokenizer.bos_token(), tokenizer.eos_token()), (Some("<s>"), Some("</s>")));
    assert_eq!(tokenizer.end_ids(), [end]);
    assert_eq!(tokenizer.token_of(end).as_deref(), Some("</s>"));
    assert!(tokenizer.encode("").unwrap().is_empty());
}

#[test]
fn offsets_are_bytes_and_keep_spaces() {
    let spans = |tokenizer: &Tokenizer, text: &str| {
        tokenizer.encode_with_offsets(text).unwrap().into_iter().map(|token| token.bytes).collect::<Vec<_>>()
    };
    let bytes = byte_level(&[("Ġ", "y")], &["</s>"]);
    assert_eq!(spans(&bytes, "a y\n</s>"), [0..1, 1..3, 3..4, 4..8]);
    // Two bytes of one character: each token stands for the whole of it.
    assert_eq!(spans(&bytes, "äb"), [0..2, 0..2, 2..3]);
    let pieces = sentence_piece(&[("▁", "y")], &["</s>"]);
    assert_eq!(spans(&pieces, "a y</s>").last(), Some(&(3..7)));
}

#[test]
fn decoding_refuses_what_is_no_id() {
    let tokenizer = byte_level(&[], &["</s>"]);
    let message = tokenizer.decode(&[-1], false).unwrap_err().to_string();
    assert!(message.contains("token id -1: ids are numbers from 0"), "{message}");
    assert_eq!(tokenizer.decode(&[100_000], false).unwrap(), "");
}

#[test]
fn a_tokenizer_of_memory_is_saved_and_loads_again() {
    let tokenizer = byte_level(&[("Ġ", "y")], &["<s>", "</s>"]);
    let folder = tempfile::tempdir().unwrap();
    tokenizer.save(folder.path()).unwrap();
    let loaded = Tokenizer::load(folder.path()).unwrap();
    assert_eq!(loaded.encode("x y</s>").unwrap(), tokenizer.encode("x y</s>").unwrap());
    assert_eq!(loaded.special_tokens(), tokenizer.special_tokens());
    assert_eq!(loaded.end_ids(), tokenizer.end_ids());
}

#[test]
fn a_loaded_tokenizer_copies_its_files() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    byte_level(&[], &["<s>", "</s>"]).save(first.path()).unwrap();
    fs::write(first.path().join("generation_config.json"), r#"{"eos_token_id": [7, 8]}"#).unwrap();
    fs::write(first.path().join("config.json"), r#"{"eos_token_id": 8}"#).unwrap();
    for name in ["tokenizer.model", "vocab.json", "merges.txt"] {
        fs::write(first.path().join(name), [b"of ", name.as_bytes(), b"\xff"].concat()).unwrap();
    }
    let loaded = Tokenizer::load(first.path()).unwrap();
    assert_eq!(loaded.end_ids(), [7, 8, loaded.id_of("</s>").unwrap()]);
    loaded.save(second.path()).unwrap();
    loaded.save(first.path()).unwrap();
    for folder in [&first, &second] {
        let again = Tokenizer::load(folder.path()).unwrap();
        assert_eq!(again.end_ids(), loaded.end_ids());
    }
    for name in [TOKENIZER_FILE, "tokenizer.model", "vocab.json", "merges.txt"] {
        let bytes = |folder: &tempfile::TempDir| fs::read(folder.path().join(name)).unwrap();
        assert_eq!(bytes(&first), bytes(&second), "{name}");
    }
}

#[test]
fn an_older_tokenizers_files_do_not_stay() {
    let (folder, source) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let made = byte_level(&[], &["<s>", "</s>"]);
    made.save(source.path()).unwrap();
    for tokenizer in [made, Tokenizer::load(source.path()).unwrap()] {
        for name in ["chat_template.jinja", "generation_config.json", "special_tokens_map.json"] {
            fs::write(folder.path().join(name), r#"{"eos_token_id": [7]}"#).unwrap();
        }
        fs::write(folder.path().join("config.json"), "{}").unwrap();
        tokenizer.save(folder.path()).unwrap();
        let mut left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["config.json", "tokenizer.json", "tokenizer_config.json"]);
    }
}

#[test]
fn what_is_missing_or_broken_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let message = Tokenizer::load(folder.path()).unwrap_err().to_string();
    assert!(message.contains("tokenizer.json: No such file"), "{message}");
    byte_level(&[], &["<s>"]).save(folder.path()).unwrap();
    fs::write(folder.path().join("tokenizer_config.json"), r#"{"eos_token": "<none>"}"#).unwrap();
    let message = Tokenizer::load(folder.path()).unwrap_err().to_string();
    assert!(message.contains(r#"eos_token = "<none>" is not in the vocabulary"#), "{message}");
    fs::write(folder.path().join(TOKENIZER_FILE), "{}").unwrap();
    let message = Tokenizer::load(folder.path()).unwrap_err().to_string();
    assert!(message.contains("not a tokenizer that this build reads"), "{message}");
}
