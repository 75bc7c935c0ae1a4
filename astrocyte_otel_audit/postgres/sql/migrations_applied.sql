SELECT version FROM {migrations}
