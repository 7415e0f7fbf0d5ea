//! Every example as a process, at its quick size: what it leaves, how it stops and goes on, what it refuses.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Once, OnceLock},
    time::Duration,
};

use advtrain::{
    Algorithm, AttackSettings, ContinuousSettings, EvaluationPreset, EvaluationSettings, JsonLines, ModelPreset, Pgd,
    Preset, Radius, Request, RunConfig, StepRule, StepSize, StringShares, ThreatModel, UpdateMetrics, load_behaviors,
    load_harmless, split_by_name,
};
use serde_json::{Value, json};

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
    let mut command = Command::new(profile.join("examples").join(name));
    // Several run at a time, and the toy is too small to gain from threads.
    command.env("OMP_NUM_THREADS", "1");
    if !["custom_attack", "self_distil"].contains(&name) {
        command.arg("--quick");
    }
    command
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
    assert!(text.contains(in_message), "{text:?} does not say {in_message:?}");
    assert!(!text.contains("panicked"), "{text}");
}

/// The configuration that a command would train with.
fn printed(command: &mut Command) -> RunConfig {
    let text = command.arg("--print-config").output().unwrap().stdout;
    RunConfig::from_toml(&String::from_utf8(text).unwrap(), "printed").unwrap()
}

/// A finished quick run of `advipo_gemma`: its toy serves as the model and the data of real runs.
struct Toy(PathBuf);

fn toy() -> &'static Toy {
    static TOY: OnceLock<(tempfile::TempDir, Toy)> = OnceLock::new();
    let make = || {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        leaves_everything("advipo_gemma", &run);
        (folder, Toy(run.join("toy-quick")))
    };
    &TOY.get_or_init(make).1
}

impl Toy {
    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A real run on the toy's files, without chats.
    fn run(&self, name: &str, out: &Path) -> Command {
        let behaviors = ["behaviors_training.csv", "targets_training.json"];
        self.run_on(name, out, &self.file("model"), behaviors.map(|file| self.file(file)))
    }

    fn run_on(&self, name: &str, out: &Path, model: &Path, [behaviors, targets]: [PathBuf; 2]) -> Command {
        let mut command = example(name);
        command.args(["--device", "cpu", "--out"]).arg(out).arg("--model").arg(model);
        command.arg("--behaviors").arg(behaviors).arg("--targets").arg(targets);
        command
    }

    /// The same with chats to stay useful on, for longer, with a checkpoint every second update, and measured every third.
    fn longer_run(&self, out: &Path) -> Command {
        let config = self.0.join("longer.toml");
        let mut run = printed(&mut example("advul"));
        run.train.checkpoint_every = 2;
        run.train.dropout = true;
        run.lora.dropout = 0.1;
        run.attack_settings.warm_start = true;
        run.data.utility_tokens = Some(4);
        run.write(&config).unwrap();
        let mut command = self.run("advul", out);
        command.arg("--config").arg(config).args(["--updates", "8", "--curve", "3", "--utility"]);
        command.arg(self.file("harmless_training.jsonl"));
        command
    }

    /// An evaluation of the toy's model on its held-out behaviours.
    fn evaluation(&self, out: &Path) -> Command {
        let behaviors = ["behaviors_validation.csv", "targets_validation.json"];
        self.run_on("evaluate", out, &self.file("model"), behaviors.map(|file| self.file(file)))
    }
}

fn leaves_everything(name: &str, out: &Path) {
    let said = succeeds(example(name).args(["--merged", "--device", "cpu", "--out"]).arg(out));
    assert!(said.contains("embedding attack succeeds"), "{said}");
    for file in [
        "run.toml",
        "inputs.json",
        "before.json",
        "after.json",
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
    assert_eq!(updates(out), [1, 2, 3]);
    assert!(fs::read_dir(out.join("tensorboard")).unwrap().count() > 0);
    let card = fs::read_to_string(out.join("adapter/README.md")).unwrap();
    assert!(card.contains("embedding attack succeeds") && card.contains("max_updates = 3"), "{card}");
}

/// The updates of a run's metrics, in the order of the file.
fn updates(out: &Path) -> Vec<usize> {
    JsonLines::<UpdateMetrics>::read(out.join("metrics.jsonl"))
        .map_or(Vec::new(), |all| all.iter().map(|one| one.update).collect())
}

#[test]
fn advipo_gemma() {
    toy();
}

#[test]
fn advul() {
    let folder = tempfile::tempdir().unwrap();
    leaves_everything("advul", &folder.path().join("run"));
}

#[test]
fn custom_attack() {
    let said = succeeds(&mut example("custom_attack"));
    assert!(said.contains("update 10"), "{said}");
}

#[test]
fn held_out_requests_of_the_toy_are_of_word_pairs_that_no_training_row_has() {
    let pairs = |file: &str| -> Vec<String> {
        let text = fs::read_to_string(toy().file(file)).unwrap();
        let ids = text.lines().filter_map(|line| {
            let id = match serde_json::from_str::<Value>(line) {
                Ok(chat) => chat["prompt_id"].as_str()?.to_string(),
                Err(_) => line.rsplit(',').next()?.to_string(),
            };
            // potion_red_apple
            id.split_once('_').map(|(_, pair)| pair.to_string())
        });
        ids.collect()
    };
    let trained = [pairs("behaviors_training.csv"), pairs("harmless_training.jsonl")].concat();
    let held_out = [pairs("behaviors_validation.csv"), pairs("harmless_validation.jsonl")].concat();
    assert!(trained.len() > 50 && held_out.len() >= 8, "{} and {}", trained.len(), held_out.len());
    assert!(held_out.iter().all(|pair| !trained.contains(pair)), "{held_out:?}");
}

#[test]
fn a_finished_run_without_chats_is_found_finished() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let run = |options: &[&str]| {
        let mut command = toy().run("advipo_gemma", &out);
        command.arg("--validation-behaviors").arg(toy().file("behaviors_validation.csv"));
        command.arg("--validation-targets").arg(toy().file("targets_validation.json"));
        succeeds(command.args(options))
    };
    let first = run(&[]);
    assert!(!first.contains("chats") && !first.contains("NaN"), "{first}");
    let adapter = fs::read(out.join("adapter/adapter_model.safetensors")).unwrap();
    let again = run(&["--merged"]);
    assert!(again.contains("going on after update 3 of 3") && !again.contains("as it is"), "{again}");
    assert!(out.join("merged/model.safetensors").exists());
    assert!(fs::read(out.join("adapter/adapter_model.safetensors")).unwrap() == adapter);
    // Fewer rows to measure on: the figures before are measured anew, on the model as it was.
    let fewer = run(&["--measured", "2"]);
    assert!(fewer.contains("as it is") && fewer.contains("/2,") && !fewer.contains("/4,"), "{fewer}");
}

#[test]
fn requests_of_one_category_alone_are_measured_on() {
    let folder = tempfile::tempdir().unwrap();
    let behaviors = folder.path().join("validation.csv");
    let all = fs::read_to_string(toy().file("behaviors_validation.csv")).unwrap();
    fs::write(&behaviors, all.replacen("Category", "FunctionalCategory", 1).replacen(",,,,", ",standard,,,", 3))
        .unwrap();
    let run = |category: &str| {
        let mut command = toy().run("advipo_gemma", &folder.path().join(category));
        command.arg("--validation-behaviors").arg(&behaviors);
        command.arg("--validation-targets").arg(toy().file("targets_validation.json"));
        command.args(["--category", category]);
        command
    };
    let said = succeeds(&mut run("standard"));
    assert!(said.contains("/3,") && !said.contains("/4,"), "{said}");
    fails(&mut run("contextual"), "there are {\"standard\"}");
}

#[test]
fn another_run_in_the_same_folder_is_refused_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    succeeds(&mut toy().run("advipo_gemma", &out));
    let before = fs::read_to_string(out.join("run.toml")).unwrap();
    fails(toy().run("advipo_gemma", &out).args(["--epsilon", "0.2"]), "attack was");
    fails(toy().run("advipo_gemma", &out).args(["--updates", "2"]), "number of updates was 3 and not 2");
    assert_eq!(fs::read_to_string(out.join("run.toml")).unwrap(), before);
}

#[test]
fn training_goes_on_from_an_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
    succeeds(toy().run("advipo_gemma", &first).args(["--updates", "8"]));
    let read = |path: PathBuf| -> Value { serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap() };
    let adapter = first.join("adapter");
    let on = |out: &Path| {
        let mut command = toy().run("advipo_gemma", out);
        command.args(["--updates", "8", "--epsilon", "0.2", "--measured-epsilon", "0.1", "--adapter"]).arg(&adapter);
        command
    };
    succeeds(&mut on(&second));
    let [after, before] = [first.join("after.json"), second.join("before.json")].map(read);
    assert_ne!(read(first.join("before.json"))["measured"], after);
    assert_eq!(before["measured"], after);
    assert_ne!(read(second.join("after.json")), after);
    let [was, is] = [&first, &second].map(|out| RunConfig::read(out.join("run.toml")).unwrap().lora);
    assert_eq!((is.rank, is.alpha), (was.rank, was.alpha));
    let card = fs::read_to_string(second.join("adapter/README.md")).unwrap();
    assert!(card.contains(&format!("on from the adapter {}", adapter.display())), "{card}");
    // Another start is another run.
    fails(
        toy().run("advipo_gemma", &second).args(["--updates", "8", "--epsilon", "0.2"]),
        "a checkpoint of another run",
    );
}

#[test]
fn a_preset_can_be_printed_and_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let of_family = |family: &str| {
        printed(toy().run("advipo_gemma", folder.path()).args(["--preset", "published", "--family", family]))
    };
    let radius = |run: RunConfig| run.attack.unwrap().threat.radius;
    assert_eq!(radius(of_family("zephyr-7b")), advtrain::Radius::Relative(0.075));
    assert!(of_family("gemma-2b").attack_settings.dropout);
}

/// The first update of a run on the toy with other settings, and what was measured before it.
fn first_update(folder: &Path, change: impl FnOnce(&mut RunConfig)) -> (UpdateMetrics, Value) {
    let (out, config) = (folder.join("run"), folder.join("run.toml"));
    let mut run = printed(&mut example("advipo_gemma"));
    change(&mut run);
    fs::create_dir_all(folder).unwrap();
    run.write(&config).unwrap();
    let mut command = toy().run("advipo_gemma", &out);
    command.arg("--config").arg(&config).arg("--utility").arg(toy().file("harmless_training.jsonl"));
    succeeds(command.args(["--updates", "1"]));
    let first = JsonLines::<UpdateMetrics>::read(out.join("metrics.jsonl")).unwrap().remove(0);
    (first, serde_json::from_str(&fs::read_to_string(out.join("before.json")).unwrap()).unwrap())
}

/// The end of a turn behind each target is one token more of each harmful row, in training and not in what is measured.
#[test]
fn targets_of_behaviours_end_in_the_end_of_a_turn_where_the_settings_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let trained =
        |ended: bool| first_update(&folder.path().join(ended.to_string()), |run| run.data.ended_targets = ended);
    let ((ended, measured), (open, measured_open)) = (trained(true), trained(false));
    let rows = open.attack.unwrap().rows;
    assert!(rows > 0);
    assert_eq!(ended.tokens, open.tokens + rows);
    assert_eq!(measured, measured_open);
}

/// In training and not in what is measured; and behind rows of the named kind alone.
#[test]
fn random_strings_stand_behind_rows_where_the_settings_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let trained = |harmful: f64, utility: f64| {
        first_update(&folder.path().join(format!("{harmful}-{utility}")), |run| {
            run.data.strings = Some(StringShares { harmful, utility });
        })
    };
    let ((none, measured), (harmful, measured_harmful), (utility, measured_utility)) =
        (trained(0.0, 0.0), trained(1.0, 0.0), trained(0.0, 1.0));
    let attacked = |update: &UpdateMetrics| update.attack.as_ref().unwrap().tokens;
    let (rows, utility_rows) = (none.attack.as_ref().unwrap().rows, none.rows - none.attack.as_ref().unwrap().rows);
    assert!(attacked(&harmful) >= attacked(&none) + 5 * rows);
    assert_eq!(harmful.utility_tokens, none.utility_tokens);
    assert_eq!(attacked(&utility), attacked(&none));
    assert!(utility_rows > 0 && utility.utility_tokens >= none.utility_tokens + 5 * utility_rows);
    assert_eq!((&measured_harmful, &measured_utility), (&measured, &measured));
}

#[test]
fn what_a_training_holds_out_is_attacked_where_that_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let behaviors = load_behaviors(toy().file("behaviors_validation.csv")).unwrap();
    let mut of_seeds = Vec::new();
    for seed in [0, 1] {
        let out = folder.path().join(seed.to_string());
        let mut command = toy().evaluation(&out);
        command.args(["--attacks", "direct", "--held-out", "0.6", "--held-out-seed", &seed.to_string()]);
        succeeds(&mut command);
        let (_, expected) = split_by_name(behaviors.iter().map(|one| &one.id), 0.6, seed).unwrap();
        let expected: Vec<&str> = expected.into_iter().map(|index| behaviors[index].id.as_str()).collect();
        let mut found = attacked(&out, "direct");
        found.sort_by_key(|id| behaviors.iter().position(|one| one.id == *id));
        assert_eq!(found, expected);
        of_seeds.push(found);
    }
    assert!(!of_seeds[0].is_empty());
    assert_ne!(of_seeds[0], of_seeds[1]);
}

#[test]
fn a_control_run_says_that_it_is_one_and_is_measured_as_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str| {
        let mut command = toy().run("advul", &folder.path().join(name));
        command.arg("--utility").arg(toy().file("harmless_training.jsonl"));
        command
    };
    let mut config = printed(&mut run("any"));
    let radius = config.attack.take().unwrap().threat.radius;
    let (control, path) = (folder.path().join("control.toml"), folder.path().join("run.toml"));
    config.write(&control).unwrap();
    let Radius::Relative(share) = radius else { panic!("{radius:?}") };
    let said = succeeds(run("control").arg("--config").arg(&control));
    let epsilon = format!("epsilon of the attack: {share} of the mean norm");
    assert!(said.contains("control run") && said.contains(&epsilon), "{said}");
    config.attack_settings.restarts = 2;
    fs::write(&path, config.to_toml().unwrap()).unwrap();
    fails(run("refused").arg("--config").arg(&path), "attack_settings");
    fails(&mut toy().run("advul", &folder.path().join("without")), "needs chats to stay useful on: --utility");
}

/// What `examples/recipes/run.sh` evaluates with.
#[test]
fn the_recipe_of_evaluations_is_the_preset_but_for_what_it_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/recipes/evaluation.toml");
    let reduced = EvaluationSettings::preset(EvaluationPreset::Reduced, &ThreatModel::default());
    let named = |name: &str| reduced.embedding.iter().find(|one| one.name == name).unwrap().clone();
    let mut long = ContinuousSettings { name: "embedding-long".into(), ..named("embedding") };
    long.attack.steps = 80;
    long.around.restarts = 1;
    let embedding = vec![named("embedding"), long, named("embedding-unbounded")];
    let expected = EvaluationSettings { max_new_tokens: 64, rows: 48, embedding, ..reduced };
    assert_eq!(EvaluationSettings::read(path).unwrap(), expected);
}

/// The TOML files that `examples/recipes/run.sh` trains with.
#[test]
fn recipes_are_the_preset_small_and_its_controls() {
    let recipe = |name: &str| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/recipes");
        RunConfig::read(folder.join(name).with_extension("toml")).unwrap()
    };
    let small = |algorithm| RunConfig::preset(algorithm, Preset::Small, ModelPreset::Llama2_7b);
    let advul = small(Algorithm::AdvUl);
    assert_eq!(recipe("advul"), advul);
    assert_eq!(recipe("advipo"), small(Algorithm::AdvIpo));
    let without = AttackSettings::default();
    assert_eq!(recipe("no_attack"), RunConfig { attack: None, attack_settings: without.clone(), ..advul.clone() });
    // A step of the sign as long as the ball is wide.
    let threat = advul.attack.clone().unwrap().threat;
    let step = Pgd { threat, steps: 1, rule: StepRule::Sign, momentum: None, ..Pgd::default() };
    assert_eq!(step.size, StepSize::Decaying(1.0));
    assert_eq!(recipe("one_step"), RunConfig { attack: Some(step), attack_settings: without, ..advul.clone() });
}

#[test]
fn the_date_that_a_template_prints_stays_that_of_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let (out, config) = (folder.path().join("run"), folder.path().join("run.toml"));
    let model = dated_model(folder.path());
    let files = || ["behaviors_training.csv", "targets_training.json"].map(|file| toy().file(file));
    let run = || toy().run_on("advipo_gemma", &out, &model, files());
    let mut first = printed(&mut run());
    first.data.date = Some("2024-02-29".parse().unwrap());
    first.write(&config).unwrap();
    succeeds(run().arg("--config").arg(&config));
    // Today is another day, and the rows are the same.
    let again = succeeds(&mut run());
    assert!(again.contains("going on after update 3 of 3"), "{again}");
    assert_eq!(RunConfig::read(out.join("run.toml")).unwrap().data.date, first.data.date);
}

/// Waits until a running example has come so far.
fn until(child: &mut Child, what: &str, is_there: impl Fn() -> bool) {
    while !is_there() {
        assert!(child.try_wait().unwrap().is_none(), "ended before {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn signal(child: &Child, signal: &str) {
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
}

/// Ctrl-C, upon which a running example ends as it should.
fn stop(mut child: Child) {
    signal(&child, "-INT");
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn a_run_that_was_killed_or_stopped_ends_as_one_that_was_not() {
    let folder = tempfile::tempdir().unwrap();
    let out = |name: &str| folder.path().join(name);
    succeeds(&mut toy().longer_run(&out("whole")));
    let adapter = |name| fs::read(out(name).join("adapter/adapter_model.safetensors")).unwrap();
    let curve = |name| fs::read_to_string(out(name).join("curve.jsonl")).unwrap();
    let points: Vec<Value> = curve("whole").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(points.iter().map(|point| &point["update"]).collect::<Vec<_>>(), [3, 6]);
    assert!(points.iter().all(|point| point["measured"]["attacked_loss"].is_f64()), "{points:?}");
    for (name, signal, code) in [("killed", "-KILL", None), ("stopped", "-INT", Some(130))] {
        let mut child = toy().longer_run(&out(name)).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        until(&mut child, "update 3", || updates(&out(name)).len() >= 3);
        self::signal(&child, signal);
        assert_eq!(child.wait().unwrap().code(), code);
        assert!(!out(name).join("adapter").exists());
        let said = succeeds(&mut toy().longer_run(&out(name)));
        assert!(said.contains("going on after update"), "{said}");
        assert_eq!(updates(&out(name)), (1..=8).collect::<Vec<_>>());
        assert!(adapter(name) == adapter("whole"), "{name}");
        assert_eq!(curve(name), curve("whole"), "{name}");
    }
}

#[test]
fn a_second_ctrl_c_ends_a_run_in_the_middle_of_an_update() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("slow.toml");
    let mut slow = printed(&mut example("advul"));
    slow.attack.as_mut().unwrap().steps = 20_000;
    slow.write(&config).unwrap();
    let out = folder.path().join("out");
    let mut command = toy().run("advul", &out);
    command.arg("--config").arg(config).arg("--utility").arg(toy().file("harmless_training.jsonl"));
    command.env("OMP_NUM_THREADS", "2");
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    until(&mut child, "the first update", || out.join("metrics.jsonl").exists());
    std::thread::sleep(Duration::from_millis(500));
    signal(&child, "-INT");
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("stopping") {
        line.clear();
        assert!(said.read_line(&mut line).unwrap() > 0, "ended without a word of stopping");
    }
    signal(&child, "-INT");
    let output = child.wait_with_output().unwrap();
    let mut rest = String::new();
    said.read_to_string(&mut rest).unwrap();
    assert_eq!((output.status.code(), rest.as_str()), (Some(130), ""));
    // That is what a run says which came to the end of its update.
    assert_eq!(String::from_utf8(output.stdout).unwrap().matches("stopped").count(), 0);
    assert!(updates(&out).is_empty());
}

/// A copy of the toy's model with one file changed.
fn changed_model(folder: &Path, file: &str, change: impl Fn(Vec<u8>) -> Vec<u8>) -> PathBuf {
    let model = folder.join(format!("model-{}", fs::read_dir(folder).unwrap().count()));
    fs::create_dir(&model).unwrap();
    for entry in fs::read_dir(toy().file("model")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
    }
    let bytes = fs::read(model.join(file)).unwrap();
    fs::write(model.join(file), change(bytes)).unwrap();
    model
}

/// A copy of the toy's model whose template prints today's date.
fn dated_model(folder: &Path) -> PathBuf {
    let dated = |template: Vec<u8>| [template.as_slice(), b"{{- strftime_now('%d %b %Y') }}"].concat();
    changed_model(folder, "chat_template.jinja", dated)
}

fn edited(key: &'static str, value: Value) -> impl Fn(Vec<u8>) -> Vec<u8> {
    move |bytes| {
        let mut json: Value = serde_json::from_slice(&bytes).unwrap();
        json[key] = value.clone();
        json.to_string().into_bytes()
    }
}

#[test]
fn a_broken_model_folder_is_named_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let renamed = |bytes: Vec<u8>| {
        // Only the header names tensors; the new name is as long as the old one.
        let text = String::from_utf8_lossy(&bytes[..1 << 12]).into_owned();
        let at = text.find("layers.0.mlp.up_proj").unwrap();
        [&bytes[..at], b"layers.0.mlp.xx_proj", &bytes[at + 20..]].concat()
    };
    type Change = Box<dyn Fn(Vec<u8>) -> Vec<u8>>;
    let cases: [(&str, Change, &str); 6] = [
        ("model.safetensors", Box::new(|bytes| bytes[..bytes.len() / 2].to_vec()), "model.safetensors"),
        ("model.safetensors", Box::new(|_| b"not a tensor".to_vec()), "model.safetensors"),
        ("model.safetensors", Box::new(renamed), "layers.0.mlp.up_proj"),
        ("config.json", Box::new(edited("intermediate_size", json!(100))), "mlp"),
        ("config.json", Box::new(edited("model_type", json!("bert"))), "bert"),
        ("tokenizer.json", Box::new(|_| b"{}".to_vec()), "tokenizer.json"),
    ];
    for (file, change, in_message) in cases {
        let model = changed_model(folder.path(), file, change);
        let files = ["behaviors_training.csv", "targets_training.json"].map(|file| toy().file(file));
        fails(&mut toy().run_on("advipo_gemma", &out, &model, files), in_message);
        assert!(!out.exists(), "{file}, {in_message}");
    }
    let files = || ["behaviors_training.csv", "targets_training.json"].map(|file| toy().file(file));
    fails(&mut toy().run_on("advul", &out, &folder.path().join("nowhere"), files()), "nowhere");
    assert!(!out.exists());
}

#[test]
fn broken_data_is_named_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let written = |name: &str, text: &str| {
        fs::write(folder.path().join(name), text).unwrap();
        folder.path().join(name)
    };
    let (model, targets) = (toy().file("model"), toy().file("targets_training.json"));
    let long = "recipe ".repeat(600);
    let cases = [
        (folder.path().join("no.csv"), targets.clone(), "no.csv"),
        (written("column.csv", "Behaviour,BehaviorID\na,b\n"), targets.clone(), "Behavior"),
        (written("a.csv", "Behavior,BehaviorID\na,b\n"), written("a.json", "{\"b\": [\"\"]}"), "a.csv"),
        (written("b.csv", "Behavior,BehaviorID\na,b\n"), written("b.json", "{\"b\": "), "b.json"),
        (written("c.csv", &format!("Behavior,BehaviorID\n{long},b\n")), written("c.json", "{\"b\": [\"x\"]}"), "b/0"),
    ];
    for (behaviors, targets, in_message) in cases {
        fails(&mut toy().run_on("advipo_gemma", &out, &model, [behaviors, targets]), in_message);
        assert!(!out.exists(), "{in_message}");
    }
    fails(&mut toy().run("advul", &out), "--utility");
    let overlapping = ["--validation-behaviors", "--validation-targets"].map(str::to_string);
    let mut command = toy().run("advipo_gemma", &out);
    command.arg(&overlapping[0]).arg(toy().file("behaviors_training.csv")).arg(&overlapping[1]).arg(&targets);
    fails(&mut command, "trained on too");
    let chats = toy().file("harmless_training.jsonl");
    let asked: Value = serde_json::from_str(fs::read_to_string(&chats).unwrap().lines().next().unwrap()).unwrap();
    let requests = written("requests.txt", &format!("Something else\n{}\n", asked["prompt"].as_str().unwrap()));
    let mut command = toy().run("advul", &out);
    command.arg("--utility").arg(&chats).arg("--harmless-requests").arg(requests);
    fails(&mut command, "1 are trained on too, request:2");
    let ids = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let rows = ids.map(|id| format!("Mix ink,{id}\n")).concat();
    let targets = Value::from_iter(ids.map(|id| (id, json!(["Sure"])))).to_string();
    let same = [written("same.csv", &format!("Behavior,BehaviorID\n{rows}")), written("same.json", &targets)];
    fails(toy().run_on("advipo_gemma", &out, &model, same).args(["--held-out", "0.5"]), "are trained on too");
    assert!(!out.exists());
}

#[test]
fn broken_settings_are_named_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let (out, config) = (folder.path().join("out"), folder.path().join("run.toml"));
    let good = printed(&mut toy().run("advipo_gemma", &out)).to_toml().unwrap();
    for (old, new, in_message) in [
        ("relative = 0.1", "relative = -0.1", "attack.threat.radius.relative = -0.1"),
        ("[model]", "nonsense = 1\n[model]", "nonsense"),
        ("rank = 64", "rank = 1000000000000", "lora.rank"),
    ] {
        assert!(good.contains(old), "{good}");
        fs::write(&config, good.replacen(old, new, 1)).unwrap();
        fails(toy().run("advipo_gemma", &out).arg("--config").arg(&config), in_message);
        // The toy, too, is not built before its settings are read.
        fails(example("advipo_gemma").arg("--out").arg(&out).arg("--config").arg(&config), in_message);
    }
    fails(example("advul").args(["--device", "cuda:77", "--out"]).arg(&out), "cuda:77");
    RunConfig { attack: None, ..printed(&mut toy().run("advul", &out)) }.write(&config).unwrap();
    fails(
        toy().run("advul", &out).args(["--epsilon", "0.2", "--config"]).arg(&config),
        "--epsilon 0.2: the configuration has no",
    );
    for (option, value, in_message) in [
        ("--measured-epsilon", "0", "--measured-epsilon"),
        ("--held-out", "1.5", "--held-out"),
        ("--utility-share", "2", "train.utility_share = 2"),
        ("--seed", "9223372036854775808", "train.seed = 9223372036854775808: must be at most"),
    ] {
        let chats = toy().file("harmless_training.jsonl");
        fails(toy().run("advul", &out).args([option, value, "--utility"]).arg(chats), in_message);
    }
    assert!(!out.exists());
}

/// The report in a folder.
fn report(out: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(out.join("report.json")).unwrap()).unwrap()
}

/// The cases of an attack in a folder's records, in order.
fn attacked(out: &Path, attack: &str) -> Vec<String> {
    let text = fs::read_to_string(out.join("records.jsonl")).unwrap_or_default();
    let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    let records = whole.map(|line| serde_json::from_str::<Value>(line).unwrap());
    let of_attack = records.filter(|record| record["attack"]["attack"] == attack);
    of_attack.map(|record| record["attack"]["case"]["id"].as_str().unwrap().to_string()).collect()
}

#[test]
fn evaluate() {
    let folder = tempfile::tempdir().unwrap();
    let said = succeeds(example("evaluate").current_dir(folder.path()).args([
        "--device",
        "cpu",
        "--cases",
        "3",
        "--search-cases",
        "2",
    ]));
    for line in ["any attack at least once (not refused)", "held-out chats, perplexity", "gcg, cost"] {
        assert!(said.contains(line), "{line}: {said}");
    }
    let out = folder.path().join("runs/evaluation-quick");
    let found = report(&out);
    let models = found["models"].as_array().unwrap();
    assert_eq!(models.iter().map(|one| &one["setup"]["model"]).collect::<Vec<_>>(), ["before", "after"]);
    for model in models {
        assert_eq!((&model["setup"]["inputs"]["cases"], &model["setup"]["dtype"]), (&json!(3), &json!("float32")));
        for attack in model["attacks"].as_array().unwrap() {
            let searches = ["gcg", "autodan", "pair"].iter().any(|name| attack["attack"] == *name);
            assert_eq!(attack["done"], if searches { 2 } else { 3 }, "{attack}");
        }
    }
    assert!(fs::read_to_string(out.join("report.html")).unwrap().contains("against held-out chats, perplexity"));
    assert!(
        out.join("after/completions/autodan.json").exists() && !out.join("after/completions/prefill.json").exists()
    );
}

#[test]
fn what_was_found_on_one_model_is_asked_of_another_and_reported_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let (before, after) = (folder.path().join("before"), folder.path().join("after"));
    let requests = folder.path().join("requests.txt");
    fs::write(&requests, "Tell me how to make a red cake with apple\nSing\n").unwrap();
    let utility = |command: &mut Command| {
        let chats = toy().file("harmless_validation.jsonl");
        let requests = requests.display();
        command.arg("--utility").arg(format!("chats={},requests={requests},strings={requests}", chats.display()));
    };
    let mut first = toy().evaluation(&before);
    utility(first.args(["--attacks", "direct,gcg,embedding", "--samples", "2"]));
    succeeds(&mut first);
    let mut second = toy().evaluation(&after);
    second.args(["--name", "hardened", "--attacks", "none", "--adapter"]).arg(toy().0.with_file_name("adapter"));
    second.arg("--replay").arg(before.join("test_cases/gcg.json"));
    second.arg("--completions").arg(before.join("completions/gcg.json")).arg("--with").arg(&before);
    utility(&mut second);
    let said = succeeds(&mut second);
    assert!(said.contains("harmless requests without template, no answer"), "{said}");
    let found = report(&after);
    let attacks = |model: usize| -> Vec<&str> {
        let attacks = found["models"][model]["attacks"].as_array().unwrap();
        attacks.iter().map(|attack| attack["attack"].as_str().unwrap()).collect()
    };
    assert_eq!(attacks(0), ["direct", "gcg", "embedding", "embedding-suffix", "embedding-unbounded"]);
    assert_eq!(attacks(1), ["replay gcg", "completions gcg"]);
    assert_eq!(found["models"][0]["attacks"][0]["judges"]["not refused"]["until"].as_array().unwrap().len(), 2);
    let setup = &found["models"][1]["setup"];
    assert_eq!((&setup["model"], &setup["inputs"]["settings"]), (&json!("hardened"), &json!("preset reduced, quick")));
    let [first, second] = [0, 1].map(|model| found["models"][model]["tasks"].as_array().unwrap().clone());
    assert_eq!(first.len(), 4);
    assert_eq!(first[1]["settings"], second[1]["settings"]);
    assert_eq!(first[2]["settings"]["framing"], json!({"text": {"bos": true}}));
    // Behind strings they are other requests.
    assert_eq!(first[3]["task"], json!("harmless requests behind strings"));
    assert_ne!(first[3]["settings"]["digest"], first[1]["settings"]["digest"]);
    assert_eq!(first[3]["settings"], second[3]["settings"]);
    // The same name twice would be two columns that nobody can tell apart.
    fails(toy().evaluation(&after).arg("--with").arg(&before), "give this one another name with --name");
}

#[test]
fn a_distillation_that_was_stopped_goes_on_and_writes_what_a_whole_one_writes() {
    let folder = tempfile::tempdir().unwrap();
    let requests = folder.path().join("requests.txt");
    let chats = fs::read_to_string(toy().file("harmless_training.jsonl")).unwrap();
    let asked = |line: &str| {
        serde_json::from_str::<Value>(line).unwrap()["messages"][0]["content"].as_str().unwrap().to_string()
    };
    fs::write(&requests, chats.lines().take(40).map(|line| asked(line) + "\n").collect::<String>()).unwrap();
    let run = |out: &str| {
        let mut command = example("self_distil");
        command.args(["--device", "cpu", "--rows", "1", "--drawn", "20", "--model"]).arg(toy().file("model"));
        command.arg("--requests").arg(&requests).arg("--out").arg(folder.path().join(out));
        command
    };
    succeeds(&mut run("whole.jsonl"));
    let partial = folder.path().join("stopped.partial");
    let done = || fs::read_to_string(&partial).map_or(0, |text| text.lines().count());
    let mut child = run("stopped.jsonl").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    until(&mut child, "three requests", || done() >= 3);
    stop(child);
    assert!((3..60).contains(&done()));
    succeeds(&mut run("stopped.jsonl"));
    let [whole, stopped] =
        ["whole", "stopped"].map(|name| fs::read(folder.path().join(name).with_extension("jsonl")).unwrap());
    assert!(whole == stopped && whole.len() > 1000 && !partial.exists());
    // What was begun in another way stays as it is.
    let mut child = run("stopped.jsonl").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    until(&mut child, "a request", || done() >= 1);
    stop(child);
    let begun = fs::read(&partial).unwrap();
    fails(run("stopped.jsonl").args(["--max-new-tokens", "7"]), "begun as");
    assert!(fs::read(&partial).unwrap() == begun);
    let same = folder.path().join("requests.jsonl");
    fails(
        run("stopped.jsonl").arg("--requests").arg(format!("{},{}", requests.display(), same.display())),
        "must differ",
    );
}

#[test]
fn a_distillation_goes_on_with_the_date_that_it_was_begun_with() {
    let folder = tempfile::tempdir().unwrap();
    let model = dated_model(folder.path());
    let partial = folder.path().join("chats.partial");
    let done = || fs::read_to_string(&partial).map_or(0, |text| text.lines().count());
    let stopped_at = |least: usize| {
        let mut command = example("self_distil");
        command.args(["--device", "cpu", "--rows", "1", "--drawn", "60", "--model"]).arg(&model);
        command.arg("--out").arg(folder.path().join("chats.jsonl"));
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        until(&mut child, "so many requests", || done() >= least);
        stop(child);
        let read = fs::read_to_string(&partial).unwrap();
        read.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Value>>()
    };
    let begun = stopped_at(2);
    let earlier = begun.iter().map(|done| edited("date", json!("2024-02-29"))(done.to_string().into_bytes()));
    fs::write(&partial, earlier.map(|line| [line, b"\n".to_vec()].concat()).collect::<Vec<_>>().concat()).unwrap();
    let all = stopped_at(begun.len() + 2);
    assert!(all.iter().all(|done| done["date"] == json!("2024-02-29")), "{all:?}");
}

#[test]
fn an_evaluation_that_was_stopped_reports_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let run = || {
        let files = ["behaviors_training.csv", "targets_training.json"].map(|file| toy().file(file));
        let mut command = toy().run_on("evaluate", &out, &toy().file("model"), files);
        command.args(["--attacks", "gcg"]);
        command
    };
    let mut child = run().stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    until(&mut child, "two cases", || attacked(&out, "gcg").len() >= 2);
    fails(&mut run(), "another process is at work");
    stop(child);
    let done = attacked(&out, "gcg").len();
    let attack = report(&out)["models"][0]["attacks"][0].clone();
    assert_eq!((&attack["done"], &attack["planned"]), (&json!(done), &json!(24)));
    assert!(fs::read_to_string(out.join("report.html")).unwrap().contains(&format!("{done} of 24 done")));
    succeeds(&mut run());
    let mut cases = attacked(&out, "gcg");
    assert_eq!(cases.len(), 24);
    cases.sort();
    cases.dedup();
    assert_eq!(cases.len(), 24);
    assert_eq!(report(&out)["models"][0]["attacks"][0]["done"], 24);
}

#[test]
fn what_an_evaluation_cannot_read_is_named_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let written = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let (model, nowhere) = (toy().file("model"), folder.path().join("nowhere"));
    let targets = toy().file("targets_validation.json");
    let header = PathBuf::from(written("header.csv", "Behaviour,BehaviorID\na,b\n"));
    fails(&mut toy().run_on("evaluate", &out, &model, [header, targets.clone()]), "has no column Behavior");
    let behaviors = toy().file("behaviors_validation.csv");
    fails(&mut toy().run_on("evaluate", &out, &nowhere, [behaviors, targets]), "nowhere");

    let choices = json!([{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]);
    let question = json!({"id": "q", "question": {"stem": "Which?", "choices": choices}, "answerKey": "A"}).to_string();
    let arc = [written("a/arc.jsonl", &question), written("b/arc.jsonl", &question)].map(|path| format!("arc={path}"));
    let line = "Q,1,2,3,4,C\n";
    written("mmlu/test/birds_test.csv", line);
    let dev = written("mmlu/dev/birds_dev.csv", &line.repeat(4));
    let mmlu = format!("mmlu={}", folder.path().join("mmlu").display());
    let nowhere = nowhere.display().to_string();
    for (options, in_message) in [
        (vec!["--with", &nowhere], "nowhere"),
        (vec!["--replay", &written("empty.json", "{}")], "holds no behaviour id"),
        (vec!["--completions", &written("wrong.json", r#"{"a": ["b"]}"#)], "wrong.json"),
        (vec!["--utility", &format!("xstest={nowhere}")], "nowhere"),
        (vec!["--utility", &arc.join(",")], "both give a task of the name \"arc\""),
        (vec!["--utility", &mmlu], &format!("{dev}: holds 4 questions; at least 5 are needed")),
        (vec!["--attacks", "none,gcg"], "none cannot stand beside other attacks"),
        (vec!["--category", "odd"], "of the category odd; there are {}"),
        (vec!["--held-out", "2"], "--held-out: validation_share = 2: must be between 0 and 1"),
        (vec!["--held-out", "0"], "among those that are held out with a share of 0 and seed 0"),
    ] {
        fails(toy().evaluation(&out).args(options), in_message);
        assert!(!out.exists(), "{in_message}");
    }
    fails(toy().evaluation(&out).args(["--classifier", &nowhere]), "nowhere");
    assert!(!out.join("report.json").exists() && attacked(&out, "direct").is_empty());
    for (options, in_message) in [
        (["--cases", "0"], "zero"),
        (["--items", "0"], "zero"),
        (["--utility", "arcs=x"], "must be KIND=PATH"),
        (["--attacks", "all"], "invalid value"),
    ] {
        let output = toy().evaluation(&out).args(options).output().unwrap();
        assert!(output.status.code() == Some(2) && text(&output).contains(in_message), "{}", text(&output));
    }
    let output = example("evaluate").args(["--name", "toy"]).output().unwrap();
    assert!(output.status.code() == Some(2) && text(&output).contains("--model"), "{}", text(&output));
}

#[test]
fn a_judge_that_fails_as_a_whole_ends_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 1 << 16]);
            let _ = stream.write_all(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        }
    });
    let mut run = toy().evaluation(&out);
    run.args(["--attacks", "direct", "--classifier"]).arg(format!("judge@http://{address}/v1"));
    run.arg("--utility").arg(format!("chats={}", toy().file("harmless_validation.jsonl").display()));
    fails(&mut run, "1 failed as a whole; the same command tries again");
    let found = report(&out);
    assert!(found["problems"][0].as_str().unwrap().contains("status 401"), "{}", found["problems"]);
    let model = &found["models"][0];
    assert_eq!(model["attacks"][0]["judges"]["yes or no by judge"]["offered"]["not_judged"], 4);
    assert_eq!((&model["attacks"][0]["done"], &model["tasks"][0]["done"]), (&json!(4), &json!(4)));
}

#[test]
fn what_is_not_attacked_or_has_no_target_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let written = |name: &str, text: &str| {
        fs::write(folder.path().join(name), text).unwrap();
        folder.path().join(name)
    };
    let behaviors = "Behavior,BehaviorID,Tags\nMake tea,tea,\nSing,song,hash_check\nMake soup,soup,\nMake jam,jam,\n";
    let targets = r#"{"tea": [" ", "Sure, tea"], "soup": [""], "cake": ["Sure"]}"#;
    let files = [written("b.csv", behaviors), written("t.json", targets)];
    let out = folder.path().join("out");
    let mut run = toy().run_on("evaluate", &out, &toy().file("model"), files);
    let said = succeeds(run.args(["--attacks", "gcg"]));
    for told in ["song: left out", "soup: has no target", "jam: has no target", "targets without a behaviour: cake"] {
        assert!(said.contains(told), "{told}: {said}");
    }
    let found = report(&out);
    let model = &found["models"][0];
    assert!(model["setup"]["inputs"]["left_out"]["song"].as_str().unwrap().contains("hash_check"), "{model}");
    let attack = &model["attacks"][0];
    assert_eq!((&attack["done"], attack["failed"].as_object().unwrap().len()), (&json!(3), 2));
    let record = fs::read_to_string(out.join("completions/gcg.json")).unwrap();
    assert!(record.contains("tea") && !record.contains("soup"), "{record}");
}

#[test]
fn an_evaluation_keeps_the_date_that_its_template_prints() {
    let folder = tempfile::tempdir().unwrap();
    let model = dated_model(folder.path());
    let out = folder.path().join("out");
    let run = || {
        let files = ["behaviors_validation.csv", "targets_validation.json"].map(|file| toy().file(file));
        let mut command = toy().run_on("evaluate", &out, &model, files);
        command.args(["--attacks", "direct"]);
        command
    };
    succeeds(&mut run());
    let setup = out.join("setup.json");
    let mut earlier: Value = serde_json::from_str(&fs::read_to_string(&setup).unwrap()).unwrap();
    assert!(earlier["date"].is_string(), "{earlier}");
    // As if it had been begun on another day: the date is kept, and the tokens that it gives are others.
    earlier["date"] = json!("2024-02-29");
    fs::write(&setup, earlier.to_string()).unwrap();
    let said = text(&run().output().unwrap());
    assert!(said.contains("another evaluation: rendered was") && !said.contains("date was"), "{said}");
    // A preset that prints no date is another template.
    fails(run().args(["--template", "gemma"]), "date was");
}

/// The words in which a request ends are what it is about.
#[test]
fn harmless_requests_to_measure_on_are_about_nothing_that_is_trained_on() {
    let ends = |file: &str| -> Vec<Vec<String>> {
        let requests = load_harmless(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data").join(file)).unwrap();
        let letters = |word: &str| word.to_lowercase().replace(|letter: char| !letter.is_alphanumeric(), "");
        let last = |request: Request| {
            let words: Vec<String> = request.text.split_whitespace().map(letters).collect();
            words[words.len().saturating_sub(3)..].to_vec()
        };
        requests.into_iter().map(last).collect()
    };
    let all = |files: &[&str]| -> Vec<Vec<String>> { files.iter().copied().flat_map(ends).collect() };
    let trained = all(&["harmless_training.txt", "harmless_twins.txt", "sounding_training.txt"]);
    let measured = all(&["harmless_validation.txt", "sounding_held_out.txt"]);
    assert_eq!((measured.len(), trained.len()), (50 + 93, 771 + 698 + 545));
    let both: Vec<_> = measured.iter().filter(|end| trained.contains(end)).collect();
    assert!(both.is_empty(), "{both:?}");
}
