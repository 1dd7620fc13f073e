//! Finds the images in the engine's store that are in use, and removes all others. Only a fetch of the same image
//! waits for a removal.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;

use super::app::AgentApp;
use super::core::{Agent, lock};
use crate::driver::Error;
use crate::driver::podman::render;

/// Names of images that are about to be used or removed.
#[derive(Default)]
pub(super) struct Images {
    state: Mutex<ImagesState>,
    gone: Notify,
}

#[derive(Default)]
struct ImagesState {
    /// Images being fetched or recorded, and by how many tasks.
    held: HashMap<String, usize>,
    /// Images being removed.
    going: HashSet<String>,
}

/// An image that is not removed while this value lives.
pub(super) struct HeldImage<'a> {
    images: &'a Images,
    name: String,
}

impl Drop for HeldImage<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.images.state);
        if let Some(count) = state.held.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                state.held.remove(&self.name);
            }
        }
    }
}

/// Images that are being removed until this value is dropped.
struct Going<'a> {
    images: &'a Images,
    names: Vec<String>,
}

impl Drop for Going<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.images.state);
        for name in &self.names {
            state.going.remove(name);
        }
        drop(state);
        self.images.gone.notify_waiters();
    }
}

impl Images {
    /// Protects an image from removal; waits for a removal of the same image that has already begun.
    pub(super) async fn hold(&self, name: &str) -> HeldImage<'_> {
        loop {
            let gone = self.gone.notified();
            {
                let mut state = lock(&self.state);
                if !state.going.contains(name) {
                    *state.held.entry(name.to_owned()).or_default() += 1;
                    return HeldImage { images: self, name: name.to_owned() };
                }
            }
            gone.await;
        }
    }

    /// Begins the removal of an image under all of its names. Returns none if one of them is held.
    fn let_go(&self, names: &[String]) -> Option<Going<'_>> {
        let mut state = lock(&self.state);
        if names.iter().any(|name| state.held.contains_key(name)) {
            return None;
        }
        state.going.extend(names.iter().cloned());
        Some(Going { images: self, names: names.to_vec() })
    }
}

/// Removes images that no app needs, after a change and once an hour.
pub(super) async fn tidying(agent: Arc<Agent>) {
    loop {
        let _ = tokio::time::timeout(Duration::from_secs(3600), agent.tidy.notified()).await;
        if let Err(error) = agent.remove_unused_images().await {
            tracing::warn!(%error, "unused images cannot be removed");
        }
        // A burst of changes causes one run.
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
}

impl Agent {
    /// Removes images that belong to neither the desired nor the previous release of any app. A rollback fetches
    /// its image again: the registry keeps deployed images. A removal that fails does not stop the others.
    async fn remove_unused_images(&self) -> Result<(), Error> {
        for (id, names) in self.podman.images().await? {
            // Begun before the apps are checked: an app that needs the image from now on waits and fetches it
            // again.
            let Some(_going) = self.images.let_go(&names) else { continue };
            if self.needs_one_of(&names) {
                continue;
            }
            let _waiting = self.engine.beside();
            match self.podman.remove_image(&id, &names).await {
                Ok(false) => tracing::warn!(id, "an unused image is still there"),
                Ok(true) => tracing::info!(id, "an image that no app needs was removed"),
                Err(error) => tracing::warn!(id, %error, "an unused image cannot be removed"),
            }
        }
        Ok(())
    }

    fn needs_one_of(&self, names: &[String]) -> bool {
        let apps: Vec<Arc<AgentApp>> = lock(&self.apps).values().cloned().collect();
        apps.iter().any(|app| {
            let kept = lock(&app.kept);
            let mut both = std::iter::once(&kept.workload).chain(&kept.previous);
            both.any(|workload| names.contains(&render::image(&self.config, workload)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_image_is_held_or_goes_and_others_wait_for_neither() {
        let images = Images::default();
        let names = ["a".to_owned(), "b".to_owned()];
        let (first, second) = (images.hold("a").await, images.hold("a").await);
        assert!(images.let_go(&names).is_none());
        drop(first);
        assert!(images.let_go(&names).is_none(), "one of two still holds it");
        drop(second);
        let going = images.let_go(&names).unwrap();
        let other = images.hold("c").await;
        let mut waits = Box::pin(images.hold("b"));
        assert!(futures_util::poll!(&mut waits).is_pending());
        drop(going);
        drop((waits.await, other));
        assert!(lock(&images.state).held.is_empty() && lock(&images.state).going.is_empty());
    }
}
