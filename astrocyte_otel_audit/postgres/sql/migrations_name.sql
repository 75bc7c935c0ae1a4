{migrations}
