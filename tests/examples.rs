//! Every example as a process, at its quick size.

use std::{
    path::Path,
    process::{Command, Output},
    sync::Once,
};

/// The example's program, built in the profile of this test.
fn example(name: &str) -> Command {
    static BUILT: Once = Once::new();
    let tests = std::env::current_exe().unwrap();
    let profile = tests.parent().unwrap().parent().unwrap().to_path_buf();
    BUILT.call_once(|| {
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--examples"]).current_dir(env!("CARGO_MANIFEST_DIR"));
        if profile.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().unwrap().success());
    });
    Command::new(profile.join("examples").join(name))
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn succeeds(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    text(&output)
}

fn fails(command: &mut Command, in_message: &str) {
    let output = command.output().unwrap();
    let text = text(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains(in_message), "{text}");
    assert!(!text.contains("panicked"), "{text}");
}

fn trains(name: &str) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let said = succeeds(example(name).args(["--quick", "--merged", "--device", "cpu", "--out"]).arg(&out));
    assert!(said.contains("embedding attack succeeds"), "{said}");
    for file in [
        "run.toml",
        "metrics.jsonl",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/README.md",
        "merged/config.json",
        "merged/model.safetensors",
        "merged/tokenizer.json",
        "merged/chat_template.jinja",
    ] {
        assert!(out.join(file).exists(), "{file} is missing");
    }
    assert_eq!(std::fs::read_to_string(out.join("metrics.jsonl")).unwrap().lines().count(), 3);
    assert!(std::fs::read_dir(out.join("tensorboard")).unwrap().count() > 0);
    bad_input(name, &out);
}

/// What was written serves as the model and the data of a real run; then each part of it is made wrong.
fn bad_input(name: &str, out: &Path) {
    let toy = out.join("toy");
    let (model, targets) = (out.join("merged"), toy.join("targets_training.json"));
    let behaviors = toy.join("behaviors_training.csv");
    let real = |model: &Path, behaviors: &Path| {
        let mut command = example(name);
        command.args(["--quick", "--device", "cpu", "--out"]).arg(out.join("second"));
        command.arg("--model").arg(model).arg("--behaviors").arg(behaviors).arg("--targets").arg(&targets);
        command.arg("--utility").arg(toy.join("harmless_training.jsonl"));
        command
    };
    succeeds(&mut real(&model, &behaviors));
    fails(&mut real(&out.join("nowhere"), &behaviors), "nowhere");
    fails(&mut real(&model, &toy.join("no.csv")), "no.csv");
    let without_column = toy.join("without_column.csv");
    std::fs::write(&without_column, "Behaviour,BehaviorID\na,b\n").unwrap();
    fails(&mut real(&model, &without_column), "Behavior");
    let config = out.join("wrong.toml");
    let text = std::fs::read_to_string(out.join("run.toml")).unwrap();
    std::fs::write(&config, text.replacen("relative = 0.1", "relative = -0.1", 1)).unwrap();
    fails(real(&model, &behaviors).arg("--config").arg(&config), "attack.threat.radius.relative = -0.1");
    std::fs::write(&config, format!("nonsense = 1\n{text}")).unwrap();
    fails(real(&model, &behaviors).arg("--config").arg(&config), "nonsense");
    let mut on_cuda = example(name);
    fails(on_cuda.args(["--quick", "--device", "cuda:77", "--out"]).arg(out.join("third")), "cuda:77");
}

#[test]
fn advipo_gemma() {
    trains("advipo_gemma");
}

#[test]
fn advul() {
    trains("advul");
}

#[test]
fn custom_attack() {
    let said = succeeds(&mut example("custom_attack"));
    assert!(said.contains("update 10"), "{said}");
}
