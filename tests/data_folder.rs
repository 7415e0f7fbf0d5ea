//! From text files to batches of examples, through the public interface alone, with a tokenizer that is trained here.

use std::path::PathBuf;

use advtrain::{
    BehaviorFiles, ChatFormat, ChatReader, ChatTemplate, ContinuationKind, Message, Sampler, SamplerSettings, Source,
    SpecialTokens, TemplatePreset, Tokenizer, Turns, encode_chats, encode_pairs, load_behavior_pairs, load_preferences,
    split_by_name,
};
use tokenizers::{
    AddedToken,
    models::bpe::{BPE, BpeTrainerBuilder},
    pre_tokenizers::byte_level::ByteLevel,
};

fn toy(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/data").join(name)
}

fn trained() -> Tokenizer {
    let mut inner = tokenizers::Tokenizer::new(BPE::default());
    inner.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    inner.with_decoder(Some(ByteLevel::default()));
    let special = ["<bos>", "<start_of_turn>", "<end_of_turn>"].map(|token| AddedToken::from(token, true));
    let mut trainer: tokenizers::models::TrainerWrapper = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(400)
        .special_tokens(special.to_vec())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build()
        .into();
    let chats = ChatReader::open(toy("chats.jsonl")).unwrap().map(Result::unwrap);
    let texts = chats.flat_map(|chat| chat.messages).map(|message| message.content);
    inner.train(&mut trainer, texts).unwrap();
    Tokenizer::from_parts(inner, SpecialTokens::new([("bos_token", "<bos>"), ("eos_token", "<end_of_turn>")])).unwrap()
}

#[test]
fn a_folder_written_here_gives_the_same_examples() {
    let template = ChatTemplate::preset(TemplatePreset::Gemma).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let format = ChatFormat::new(trained(), template.clone()).unwrap();
    format.tokenizer().save(folder.path()).unwrap();
    template.save(folder.path()).unwrap();
    let loaded = ChatFormat::load(folder.path()).unwrap();
    assert_eq!(loaded.end_ids(), format.end_ids());
    assert_eq!(loaded.template().hash(), template.hash());

    let (pairs, _) = load_preferences(toy("preferences.jsonl")).unwrap();
    let encode = |format| encode_pairs(format, &pairs, 128).unwrap().0;
    assert_eq!(encode(&loaded), encode(&format));
}

#[test]
fn text_files_become_batches() {
    let format = ChatFormat::new(trained(), ChatTemplate::preset(TemplatePreset::Gemma).unwrap()).unwrap();
    let files = BehaviorFiles {
        behaviors: toy("behaviors.csv"),
        targets: toy("targets.json"),
        safe_responses: Some(toy("safe_responses.csv")),
    };
    let (pairs, _) = load_behavior_pairs(&files).unwrap();
    let (training, validation) = split_by_name(pairs.iter().map(|pair| &pair.group), 0.3, 5).unwrap();
    assert!(!validation.is_empty());
    let groups = |rows: &[usize]| rows.iter().map(|row| pairs[*row].group.clone()).collect::<Vec<_>>();
    assert!(groups(&training).iter().all(|group| !groups(&validation).contains(group)));

    let (harmful, _) = encode_pairs(&format, &pairs, 128).unwrap();
    // The system message of one conversation is what this template refuses.
    let chats = ChatReader::open(toy("chats.jsonl")).unwrap();
    let chats = chats.filter(|chat| chat.as_ref().is_ok_and(|chat| chat.messages[0].role != "system"));
    let (utility, _) = encode_chats(&format, chats, 128, Turns::All).unwrap();
    let sampler = Sampler::new(SamplerSettings {
        primary_rows: harmful.len(),
        utility_rows: utility.len(),
        batch_size: 4,
        utility_share: 0.5,
        seed: 1,
    })
    .unwrap();
    let end = format.end_of_turn().unwrap();
    for (source, row) in sampler.batch(3) {
        let (example, kind) = match source {
            Source::Primary => (&harmful[row], ContinuationKind::Safe),
            Source::Utility => (&utility[row], ContinuationKind::Utility),
        };
        let answer = &example.continuation(kind).unwrap().tokens;
        assert_eq!(answer.ids().last(), Some(&end));
        assert_eq!(example.prompt().ids()[0], format.tokenizer().id_of("<bos>").unwrap());
    }
    let prompt = format.prompt(&[Message::user("mint tea")]).unwrap();
    assert_eq!(
        format.tokenizer().decode(prompt.ids(), false).unwrap(),
        "<bos><start_of_turn>user\nmint tea<end_of_turn>\n<start_of_turn>model\n"
    );
}
